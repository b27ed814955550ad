"""Describable Textures, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark("Describable Textures, test, zero-shot", "wds_vtab-dtd", "dtd", images=1880)
