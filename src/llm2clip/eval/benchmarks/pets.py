"""Oxford-IIIT Pets, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark(
    "Oxford-IIIT Pets, test, zero-shot",
    "wds_vtab-pets",
    "pets",
    images=3669,
    notes=("most papers print mean_per_class of it, VTAB top1",),
)
