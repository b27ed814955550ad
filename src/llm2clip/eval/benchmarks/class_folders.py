"""Any folder of class folders, or set in CLIP_benchmark's tars, zero-shot."""

from __future__ import annotations

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
