"""COCO val2017 as Long-CLIP scores it: the first five captions of each image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llm2clip.eval.annotations import Row, coco
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD = Card(
    title="COCO val2017, 5K, as Long-CLIP scores it",
    split="val2017",
    per_image="5 or more an image, the first five of the file count",
    source="COCO's captions_val2017.json; the protocol of the code of Long-CLIP, HiMo-CLIP and FLAIR",
    licence="annotations CC BY 4.0; images by their owners' terms on Flickr",
    fetch=("captions_val2017.json in annotations/ or its zip, and val2017/ or val2017.zip (images.cocodataset.org)",),
    folders=("val2017", "images"),
    images=5000,
    captions=25_000,
    notes=("not Karpathy's split, which most papers mean by COCO-5K: coco-karpathy",),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    text = place.text("captions_val2017.json", "annotations/captions_val2017.json")
    if text is None:
        raise place.absent()
    return (replace(one, captions={"": one.captions[""][:5]}) for one in coco(text))
