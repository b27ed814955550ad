"""ImageNet-1k, zero-shot."""

from __future__ import annotations

from llm2clip.eval.benchmarks.class_folders import of_clip_benchmark

CARD, read = of_clip_benchmark(
    "ImageNet-1k, validation, zero-shot",
    "wds_imagenet1k",
    "imagenet1k",
    split="validation",
    images=50000,
    notes=("the paper prints 73 to 76 after stage 2, ProCLIP's rerun of the same recipe 53",),
)
