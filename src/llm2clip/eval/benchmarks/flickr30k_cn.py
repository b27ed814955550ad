"""Flickr30k-CN: the test split translated by people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llm2clip.eval.annotations import Row, base64_lines, by_line, objects, row, untagged
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD = Card(
    title="Flickr30k-CN, Chinese translations by people, 1K",
    split="Karpathy's test",
    per_image="5 an image, all count",
    source="Chinese-CLIP's files, or the lines of li-xirong/cross-lingual-cap",
    licence="images by Flickr's terms, not to be passed on; captions for research",
    fetch=(
        "Flickr30k-CN.zip unpacked: test_imgs.tsv and test_texts.jsonl (hf OFA-Sys/chinese-clip-eval)",
        "or flickr30k_cn_test.txt, lines of name.jpg#... TAB caption, with flickr30k-images/",
    ),
    folders=("flickr30k-images", "flickr30k_images", "images"),
    images=1000,
    captions=5000,
    notes=("flickr30k_test_zh.txt of retrieval_annotations carries parts of speech, which cost points: refused",),
)
LINE = r"(?P<image>\d+(?:\.jpg)?)(?:#\S*\s+|\.jpg,|,)(?P<caption>.*)"


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    if text := place.text("test_texts.jsonl", "Flickr30k-CN/test_texts.jsonl"):
        captions: dict[str, list[str]] = {}
        for _, one in objects(text):
            for number in one.get("image_ids", ()):
                captions.setdefault(str(number), []).append(one["text"])
        return untagged(_of_tsv(place, captions))
    if text := place.text("flickr30k_cn_test.txt", "flickr30k_test_zh.txt"):
        rows = by_line(text, LINE, header=text.lines()[0].startswith("image"))
        return untagged(row(_name(str(one.image)), one.captions[""], one.where) for one in rows)
    raise place.absent()


def _of_tsv(place: Place, captions: dict[str, list[str]]) -> Iterator[Row]:
    paths = place.paths("test_imgs.tsv", "Flickr30k-CN/test_imgs.tsv")
    if not paths:
        raise place.absent("test_imgs.tsv")
    images = base64_lines(paths[0])
    for number, own in captions.items():
        where = f"test_texts.jsonl image {number}"
        yield row(images.get(number, f"{number} of {paths[0].name}"), own, where)


def _name(image: str) -> str:
    return image if image.endswith(".jpg") else f"{image}.jpg"
