"""CIFAR-100, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark("CIFAR-100, test, zero-shot", "wds_vtab-cifar100", "cifar100", images=10000)
