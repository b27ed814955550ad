"""Long-DCI: the long captions as they stand, of the file that TULIP, HiMo-CLIP and DeBias-CLIP score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llm2clip.eval.annotations import Row, table
from llm2clip.eval.benchmarks import dci
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD: Card = replace(
    dci.CARD,
    variant_of="dci",
    title="Long-DCI, the long captions as they stand",
    split="the rows of dci_long.csv: all images of DCI that have a long caption",
    text="the column title, without the blanks around it",
    source="hf mderakhshani/Long-DCI; the protocol of TULIP, HiMo-CLIP and DeBias-CLIP",
    fetch=("dci_long.csv (hf mderakhshani/Long-DCI)", dci.FETCH[1]),
    images=None,
    captions=None,
    notes=("the file's fields are parted by tabs, whatever its name says",),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    if paths := place.paths("dci_long.csv"):
        return table(paths[0], "filepath", "title")
    raise place.absent()
