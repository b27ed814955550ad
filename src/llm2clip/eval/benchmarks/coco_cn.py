"""COCO-CN, captions written by people: the 1,053 of Chinese-CLIP's protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llm2clip.eval.annotations import Row, by_line, row, untagged
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD = Card(
    title="COCO-CN, 1,053 captions written by people",
    split="coco-cn_test.txt",
    per_image="1 or 2 an image, all count",
    source="COCO-CN 201805 v1.1 (li-xirong/coco-cn); the protocol of Chinese-CLIP (its issue 175)",
    licence="captions MIT; images by their owners' terms on Flickr",
    fetch=(
        "coco-cn-version1805v1.1.tar.gz of hf AIMClab/COCO-CN unpacked: coco-cn_test.txt, imageid.*-caption.txt",
        "with COCO's train2014/ and val2014/, or their zips",
    ),
    folders=("train2014", "val2014", "images"),
    images=1000,
    captions=1053,
    notes=(
        "FG-CLIP 2 scores the 5,000 translated ones: coco-cn-translated",
        "LLM2CLIP does not say which captions it scores",
    ),
)
LINE = r"(?P<image>COCO_\w+2014_\d{12})#\S*\s+(?P<caption>.*)"


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    return of_test(place, "imageid.human-written-caption.txt")


def of_test(place: Place, name: str) -> Iterator[Row]:
    """The rows of a caption file that the test split has."""
    inner = "coco-cn-version1805v1.1"
    split = place.text("coco-cn_test.txt", f"{inner}/coco-cn_test.txt")
    text = place.text(name, f"{inner}/{name}")
    if split is None or text is None:
        raise place.absent("coco-cn_test.txt" if split is None else name)
    wanted = {line.strip() for line in split.lines()}
    for one in untagged(by_line(text, LINE)):
        if one.image in wanted:
            yield row(f"{one.image}.jpg", one.captions[""], one.where)
