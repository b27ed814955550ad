"""CIFAR-10, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark("CIFAR-10, test, zero-shot", "wds_cifar10", "cifar10", images=10000)
