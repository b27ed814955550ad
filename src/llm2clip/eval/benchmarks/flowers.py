"""Oxford Flowers-102, zero-shot."""

from __future__ import annotations

from dataclasses import replace

from llm2clip.eval.benchmarks import class_folders
from llm2clip.eval.card import Card
from llm2clip.eval.classification import Labelled, read_labelled
from llm2clip.eval.places import Place

CARD: Card = replace(
    class_folders.CARD,
    title="Oxford Flowers-102, test, zero-shot",
    split="test",
    source="CLIP_benchmark's protocol and copy",
    fetch=(
        "the tars of hf clip-benchmark/wds_vtab-flowers in test/ with classnames.txt, or a folder of class folders",
    ),
    images=6149,
    notes=("most papers print mean_per_class of it, VTAB top1",),
)


def read(place: Place) -> Labelled:
    """The images with their classes."""
    return read_labelled(place, "flowers")
