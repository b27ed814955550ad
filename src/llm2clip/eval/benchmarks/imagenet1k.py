"""ImageNet-1k, zero-shot."""

from __future__ import annotations

from dataclasses import replace

from llm2clip.eval.benchmarks import class_folders
from llm2clip.eval.card import Card
from llm2clip.eval.classification import Labelled, read_labelled
from llm2clip.eval.places import Place

CARD: Card = replace(
    class_folders.CARD,
    title="ImageNet-1k, validation, zero-shot",
    split="validation",
    source="CLIP_benchmark's protocol and copy",
    fetch=("the tars of hf clip-benchmark/wds_imagenet1k in test/ with classnames.txt, or a folder of class folders",),
    images=50000,
    notes=("the paper prints 73 to 76 after stage 2, ProCLIP's rerun of the same recipe 53",),
)


def read(place: Place) -> Labelled:
    """The images with their classes."""
    return read_labelled(place, "imagenet1k")
