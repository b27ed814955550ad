"""DCI, whole images, the short and the long caption together: the variant of LoTLIP, FLAME and FLAIR."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llm2clip.errors import SourceError
from llm2clip.eval.annotations import Row, parsed, row
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place, Text

FETCH = (
    "dci.tar.gz unpacked: annotations/*.json (github facebookresearch/DCI)",
    "and the images that they name, in photos/ or as sa_000138.tar (SA-1B)",
)
FOLDERS = ("photos", "densely_captioned_images/photos", "images")
CARD = Card(
    title="DCI, short and long caption joined, all splits",
    split="all (train 7,599, valid 98, test 108)",
    per_image="1 an image",
    text="the short caption, a line break, the long one, without the blanks around them",
    source="DCI (github facebookresearch/DCI); the text that LoTLIP, FLAME and FLAIR start from",
    licence="captions CC BY-NC 4.0; images by the terms of SA-1B",
    fetch=FETCH,
    folders=FOLDERS,
    images=7805,
    captions=7805,
    notes=(
        "LoTLIP and FLAME then split the text at line breaks and points and join it with '. ': not done here",
        "ProCLIP scores 7,805 images and does not say which text",
        "other variants: dci-extra (FG-CLIP 2), dci-long (TULIP, HiMo-CLIP, DeBias-CLIP)",
    ),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    for image, where, short, extra in captioned(place):
        yield row(image, f"{short}\n{extra}", where)


def captioned(place: Place) -> Iterator[tuple[Any, str, str, str]]:
    """Of each annotation the image, the file's name, the short and the long caption."""
    paths = place.paths("annotations/*.json", "densely_captioned_images/annotations/*.json", "*/*/annotations/*.json")
    if not paths:
        raise place.absent()
    for path in paths:
        found = parsed(Text(path.name, path.read_text(encoding="utf-8")))
        found = found if isinstance(found, dict) else {}
        short, extra = (found.get(key) for key in ("short_caption", "extra_caption"))
        if not (isinstance(short, str) and isinstance(extra, str)):
            raise SourceError(f"{path} has no short_caption and extra_caption; unpack the archive again")
        yield found.get("image"), path.name, short.strip(), extra.strip()
