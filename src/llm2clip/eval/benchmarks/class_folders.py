"""Any folder of class folders, or set in CLIP_benchmark's tars, zero-shot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llm2clip.eval.card import Card
from llm2clip.eval.classification import Labelled, read_labelled
from llm2clip.eval.places import Place

CARD = Card(
    title="any folder of class folders, or set in CLIP_benchmark's tars, zero-shot",
    split="all that is there",
    per_image="none: class names in sentences",
    text="the names of classnames.txt, of CLIP_benchmark's package, or of the folders with blanks for _ and -; the "
    "mean of the unit vectors of all templates; one-template/ is 'a photo of a {c}.' alone",
    source="your own",
    licence="of the images",
    fetch=(
        "a folder for each class, or tars with .cls files, classnames.txt and zeroshot_classification_templates.txt",
    ),
    images=None,
    captions={},
)


def read(place: Place) -> Labelled:
    """The images with their classes."""
    return read_labelled(place)


def of_clip_benchmark(
    title: str, tars: str, key: str, *, split: str = "test", images: int | None, notes: tuple[str, ...] = ()
) -> tuple[Card, Callable[[Place], Labelled]]:
    """The card of a set of CLIP_benchmark's, and how it is read: what a file of such a set holds.

    Args:
        title: of the set.
        tars: the name of its copy on the Hub.
        key: what CLIP_benchmark's package calls it.
        split: which images.
        images: how many; None where that is not known.
        notes: what else a reader must know.
    """
    card = replace(
        CARD,
        title=title,
        split=split,
        source="CLIP_benchmark's protocol and copy",
        fetch=(f"the tars of hf clip-benchmark/{tars} in test/ with classnames.txt, or a folder of class folders",),
        images=images,
        notes=notes,
    )
    return card, lambda place: read_labelled(place, key)
