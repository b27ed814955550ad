"""Food-101, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark("Food-101, test, zero-shot", "wds_food101", "food101", images=25250)
