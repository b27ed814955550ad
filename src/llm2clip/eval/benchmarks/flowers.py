"""Oxford Flowers-102, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark(
    "Oxford Flowers-102, test, zero-shot",
    "wds_vtab-flowers",
    "flowers",
    images=6149,
    notes=("most papers print mean_per_class of it, VTAB top1",),
)
