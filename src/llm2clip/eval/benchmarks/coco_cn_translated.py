"""COCO-CN, translated captions: the 5,000 of FG-CLIP 2's protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llm2clip.eval.annotations import Row
from llm2clip.eval.benchmarks import coco_cn
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

FILE = "imageid.manually-translated-caption.txt"
CARD: Card = replace(
    coco_cn.CARD,
    variant_of="coco-cn",
    title="COCO-CN, 5,000 captions translated by people",
    per_image="5 an image, all count",
    source="COCO-CN 201805 v1.1 (li-xirong/coco-cn); the protocol of FG-CLIP 2",
    captions=5000,
    notes=("Chinese-CLIP scores the 1,053 written ones: coco-cn",),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    return coco_cn.of_test(place, FILE)
