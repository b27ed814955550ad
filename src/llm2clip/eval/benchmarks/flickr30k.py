"""Flickr30k, Karpathy's test split, 1K."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llm2clip.errors import SourceError
from llm2clip.eval.annotations import Row, by_line, listed, table, tars
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD = Card(
    title="Flickr30k, Karpathy's test split, 1K",
    split="Karpathy's test",
    per_image="5 an image, all count",
    source="Flickr30k in Karpathy's split, files of Salesforce, CLIP_benchmark, retrieval_annotations or nlphuji",
    licence="images by Flickr's terms, not to be passed on; for research",
    fetch=(
        "flickr30k_test.json (storage.googleapis.com/sfr-vision-language-research/datasets), or "
        "flickr30k_test_karpathy.txt (github mehdidc/retrieval_annotations 1.0.0), or flickr_annotations_30k.csv (hf "
        "nlphuji/flickr30k)",
        "with flickr30k-images/ or its zip (shannon.cs.illinois.edu/DenotationGraph, by request)",
        "or the tars of hf clip-benchmark/wds_flickr30k in test/, or Parquet files of nlphuji/flickr30k",
        "or the whole results_20130124.token beside one of the lists, which says what is the test split",
    ),
    folders=("flickr30k-images", "flickr30k_images", "images"),
    images=1000,
    captions=5000,
    notes=("Long-CLIP's code ranks all 31,783 images of results_20130124.token: its numbers are no 1K ones",),
)
LISTED = r"(?P<image>.+?\.jpg),(?P<caption>.*)"
TOKEN = r"(?P<image>[^\t]+\.jpg)#\d+\t(?P<caption>.*)"


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    if text := place.text("flickr30k_test.json"):
        return listed(text)
    if text := place.text("flickr30k_test_karpathy.txt"):
        return by_line(text, LISTED, header=True)
    if paths := place.paths("flickr_annotations_30k.csv"):
        return table(paths[0], "filename", "raw", where={"split": "test"})
    if paths := place.paths("test/*.tar", "*.tar"):
        return tars(paths)
    if paths := place.paths("data/*.parquet", "*.parquet", "*/*.parquet"):
        return (row for path in paths for row in table(path, "image", "caption", where={"split": "test"}))
    if text := place.text("results_20130124.token"):
        return _of_test(place, list(by_line(text, TOKEN)))
    raise place.absent()


def _of_test(place: Place, rows: list[Row]) -> Iterator[Row]:
    """Of all rows those that a list of names takes."""
    text = place.text("test.txt", "flickr30k_test.txt")
    if text is None:
        raise SourceError(
            f"{place.name}: results_20130124.token holds {len(rows):,} images and not which are the test split: add "
            "test.txt, a name or number a line (github BryanPlummer/flickr30k_entities)"
        )
    wanted = {line.strip().removesuffix(".jpg") for line in text.lines()}
    return (row for row in rows if str(row.image).removesuffix(".jpg") in wanted)
