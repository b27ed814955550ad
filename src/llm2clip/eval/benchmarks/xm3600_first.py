"""Crossmodal-3600 as CLIP_benchmark scores it: the first caption of each language."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llm2clip.eval.annotations import Row
from llm2clip.eval.benchmarks import xm3600
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD: Card = replace(
    xm3600.CARD,
    variant_of="xm3600",
    title="Crossmodal-3600, 36 languages, the first caption of each",
    per_image="1 to 4 an image and language, the first counts",
    source="google.github.io/crossmodal-3600; the protocol of CLIP_benchmark, NLLB-CLIP, MEXMA and FLAME",
    captions=dict.fromkeys(xm3600.COUNTS, 3600),
    notes=("MetaCLIP 2 and mteb take all captions: xm3600", "Quechua and Maori are near 0 for everyone"),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    return (
        replace(one, captions={language: own[:1] for language, own in one.captions.items()})
        for one in xm3600.read(place)
    )
