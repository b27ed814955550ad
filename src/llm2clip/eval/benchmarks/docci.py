"""DOCCI: whole descriptions of over a hundred words."""

from __future__ import annotations

from collections.abc import Iterable

from llm2clip.eval.annotations import Row, objects, row
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD = Card(
    title="DOCCI, long descriptions by one author",
    split="test",
    per_image="1 an image",
    text="the whole description, without the blanks around it",
    source="google.github.io/docci",
    licence="CC BY 4.0",
    fetch=("docci_descriptions.jsonlines, and docci_images.tar.gz unpacked to images/ (google.github.io/docci)",),
    folders=("images", "docci_images/images"),
    downloads=(
        "https://storage.googleapis.com/docci/data/docci_descriptions.jsonlines",
        "https://storage.googleapis.com/docci/data/docci_images.tar.gz",
    ),
    images=5000,
    captions=5000,
    notes=("the paper speaks of 1.5K images; the split has 5,000, and all who give their code use them",),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    text = place.text("docci_descriptions.jsonlines")
    if text is None:
        raise place.absent()
    found = ((where, one) for where, one in objects(text) if one.get("split") == "test")
    return (row(one.get("image_file"), one.get("description"), where) for where, one in found)
