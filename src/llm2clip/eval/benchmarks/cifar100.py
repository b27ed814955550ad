"""CIFAR-100, zero-shot."""

from __future__ import annotations

from dataclasses import replace

from llm2clip.eval.benchmarks import class_folders
from llm2clip.eval.card import Card
from llm2clip.eval.classification import Labelled, read_labelled
from llm2clip.eval.places import Place

CARD: Card = replace(
    class_folders.CARD,
    title="CIFAR-100, test, zero-shot",
    split="test",
    source="CLIP_benchmark's protocol and copy",
    fetch=(
        "the tars of hf clip-benchmark/wds_vtab-cifar100 in test/ with classnames.txt, or a folder of class folders",
    ),
    images=10000,
)


def read(place: Place) -> Labelled:
    """The images with their classes."""
    return read_labelled(place, "cifar100")
