"""XTD10: a thousand COCO images with one caption in each of eleven languages."""

from __future__ import annotations

from collections.abc import Iterable

from llm2clip.errors import SourceError
from llm2clip.eval.annotations import Row, joined, row
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place
from llm2clip.eval.writing import check_language

FOLDERS = {
    **dict.fromkeys("en es it ko pl ru tr zh".split(), "XTD10"),
    **dict.fromkeys(("de", "fr"), "MIC"),
    "jp": "STAIR",
}
"""Language -> the folder of its file."""
CARD = Card(
    title="XTD10, one caption an image in 11 languages, with Japanese",
    split="all",
    per_image="1 an image and language",
    source="github adobe-research/Cross-lingual-Test-Dataset-XTD10; German and French of MIC, Japanese of STAIR",
    licence="Adobe Research license, non-commercial; images by their owners' terms on Flickr",
    fetch=(
        "XTD10/, MIC/ and STAIR/ with their test_1kcaptions_*.txt, XTD10/test_image_names.txt (github "
        "adobe-research/Cross-lingual-Test-Dataset-XTD10)",
        "with COCO's train2014/ and val2014/, or their zips",
    ),
    folders=("train2014", "val2014", "images"),
    images=1000,
    captions=dict.fromkeys(FOLDERS, 1000),
    notes=("800 of the images are of COCO's train2014: no test for who trained on COCO",),
)


def read(place: Place) -> Iterable[Row]:
    """The rows, each with its captions in all languages; line i belongs to image i."""
    names = place.text("XTD10/test_image_names.txt", "test_image_names.txt")
    if names is None:
        raise place.absent("XTD10/test_image_names.txt")
    images = [line.strip() for line in names.lines()]
    rows = []
    for language, folder in FOLDERS.items():
        file = f"test_1kcaptions_{language}.txt"
        text = place.text(f"{folder}/{file}", file)
        if text is None:
            raise place.absent(f"{folder}/{file}")
        lines = text.lines()
        if len(lines) != len(images):
            raise SourceError(f"{text.name} has {len(lines):,} lines for {len(images):,} images; fetch it again")
        check_language(lines, language, text.name)
        rows += [
            row(image, line, f"{text.name} line {number}", language)
            for number, (image, line) in enumerate(zip(images, lines, strict=True), 1)
        ]
    return joined(rows)
