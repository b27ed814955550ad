"""Caltech-101, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark(
    "Caltech-101, test, zero-shot",
    "wds_vtab-caltech101",
    "caltech101_vtab",
    images=None,
    notes=("most papers print mean_per_class of it, VTAB top1", "ProCLIP scores 5,677 images"),
)
