"""SUN397, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark(
    "SUN397, test, zero-shot",
    "wds_sun397",
    "sun397",
    images=None,
    notes=("ProCLIP scores 19,850 images, CLIP_benchmark more: say which",),
)
