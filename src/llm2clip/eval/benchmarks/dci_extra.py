"""DCI, the long caption alone, in lower case: the variant of FG-CLIP 2."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llm2clip.eval.annotations import Row, row
from llm2clip.eval.benchmarks import dci
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD: Card = replace(
    dci.CARD,
    variant_of="dci",
    title="DCI, the long caption alone in lower case, as FG-CLIP 2 scores it",
    split="all whose long caption is not empty",
    text="the long caption alone, in lower case, without the blanks around it",
    source="DCI (github facebookresearch/DCI); the protocol of FG-CLIP 2",
    images=None,
    captions=None,
    notes=("images without a long caption are left out, and counted in the report",),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    found = list(dci.captioned(place))
    if empty := sum(not extra for *_, extra in found):
        place.note(f"{empty:,} of {len(found):,} images have no long caption and are left out")
    return (row(image, extra.lower(), where) for image, where, _, extra in found if extra)
