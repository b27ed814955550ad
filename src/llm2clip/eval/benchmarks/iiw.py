"""ImageInWords: its three human-annotated sets pooled, as LoTLIP scores them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llm2clip.eval.annotations import Row, objects, row
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

SETS = {"IIW-400": "image/key", "DCI_Test": "image", "DOCCI_Test": "image"}
"""Folder -> the key of the image's name; a name without an ending is a .jpg."""
CARD = Card(
    title="ImageInWords, three sets of hyper-detailed descriptions pooled",
    split="IIW-400 (400), DCI_Test (112), DOCCI_Test (100)",
    per_image="1 an image: the key IIW",
    source="github google/imageinwords; pooled as LoTLIP does",
    licence="CC BY 4.0; images by the terms of DOCCI and SA-1B",
    fetch=(
        "datasets/{IIW-400,DCI_Test,DOCCI_Test}/data.jsonl (github google/imageinwords)",
        "in images/ those of docci_images_aar.tar.gz (aar_test_*), docci_images.tar.gz (test_*), SA-1B (sa_*)",
    ),
    folders=("images", "images_aar", "photos"),
    images=612,
    captions=612,
    notes=("CM_3600 and LocNar_Eval of the same place hold machine captions and are no part of it",),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    return (one for folder, key in SETS.items() for one in _of(place, folder, key))


def _of(place: Place, folder: str, key: str) -> Iterator[Row]:
    text = place.text(f"{folder}/data.jsonl", f"datasets/{folder}/data.jsonl")
    if text is None:
        raise place.absent(f"{folder}/data.jsonl")
    for where, one in objects(text):
        name = one.get(key)
        yield row(f"{name}.jpg" if isinstance(name, str) and "." not in name else name, one.get("IIW"), where)
