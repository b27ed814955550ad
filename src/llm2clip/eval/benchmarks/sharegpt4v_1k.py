"""ShareGPT4V-1k: the first thousand rows of its caption file, which others train on from there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from llm2clip.data.rows import open_text
from llm2clip.errors import SourceError
from llm2clip.eval.annotations import Row, first_objects, row
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
CARD = Card(
    title="ShareGPT4V-1k, long machine captions",
    split="the first 1,000 rows of the file",
    per_image="1 an image: the second turn of its conversation",
    source="hf Lin-Chen/ShareGPT4V; the protocol of Long-CLIP's and LLM2CLIP's code",
    licence="captions CC BY-NC 4.0; images by the terms of SA-1B",
    fetch=(
        f"{FILE} (hf Lin-Chen/ShareGPT4V)",
        "and the images that its first 1,000 rows name (sam/images/sa_*.jpg, of SA-1B's tars), or such a tar",
    ),
    folders=("images", "sam/images"),
    images=1000,
    captions=1000,
    notes=(
        "the rest of the file is what Long-CLIP and others train on: captions of one kind with the training's, near "
        "the ceiling (99)",
    ),
)


def read(place: Place) -> Iterator[Row] | Iterable[Row]:
    """The rows."""
    paths = place.paths(FILE, f"*/{FILE}")
    if not paths:
        raise place.absent()
    with open_text(str(paths[0])) as file:  # of a gigabyte and a half the first megabytes
        found = list(itertools.islice(first_objects(file, FILE), 1000))
    for number, one in enumerate(found, 1):
        turns, where = one.get("conversations"), f"{FILE} row {number}"
        if not isinstance(turns, list) or len(turns) < 2 or not isinstance(turns[1], dict):
            raise SourceError(f"{where} holds no conversation of two turns; fetch the file again")
        yield row(one.get("image"), turns[1].get("value"), where)
