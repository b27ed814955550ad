"""FGVC Aircraft, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark(
    "FGVC Aircraft, test, zero-shot",
    "wds_fgvc_aircraft",
    "fgvc_aircraft",
    images=3333,
    notes=("most papers print mean_per_class of it, VTAB top1",),
)
