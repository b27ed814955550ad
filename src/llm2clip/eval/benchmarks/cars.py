"""Stanford Cars, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark("Stanford Cars, test, zero-shot", "wds_cars", "cars", images=8041)
