"""Caltech-101, zero-shot."""

from __future__ import annotations

from dataclasses import replace

from llm2clip.eval.benchmarks import class_folders
from llm2clip.eval.card import Card
from llm2clip.eval.classification import Labelled, read_labelled
from llm2clip.eval.places import Place

CARD: Card = replace(
    class_folders.CARD,
    title="Caltech-101, test, zero-shot",
    split="test",
    source="CLIP_benchmark's protocol and copy",
    fetch=(
        "the tars of hf clip-benchmark/wds_vtab-caltech101 in test/ with classnames.txt, or a folder of class folders",
    ),
    images=None,
    notes=(
        "most papers print mean_per_class of it, VTAB top1",
        "ProCLIP scores 5,677 images",
    ),
)


def read(place: Place) -> Labelled:
    """The images with their classes."""
    return read_labelled(place, "caltech101_vtab")
