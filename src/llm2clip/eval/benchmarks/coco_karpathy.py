"""COCO, Karpathy's test split, 5K: the usual short-caption retrieval, and caption retrieval accuracy."""

from __future__ import annotations

from collections.abc import Iterable

from llm2clip.eval.annotations import Row, coco, listed, tars
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD = Card(
    title="COCO, Karpathy's test split, 5K",
    split="Karpathy's test",
    per_image="5 to 7 an image, all count (many papers keep the first five, 25,000)",
    source="COCO captions in Karpathy's split, files of Salesforce, CLIP_benchmark or retrieval_annotations",
    licence="annotations CC BY 4.0; images by their owners' terms on Flickr",
    fetch=(
        "coco_karpathy_test.json (storage.googleapis.com/sfr-vision-language-research/datasets), or "
        "coco_test_karpathy.json (github mehdidc/retrieval_annotations 1.0.0)",
        "with val2014/ or val2014.zip (images.cocodataset.org/zips)",
        "or the tars of hf clip-benchmark/wds_mscoco_captions in test/",
    ),
    folders=("val2014", "images"),
    images=5000,
    captions=25_010,
    notes=(
        "Long-CLIP, HiMo-CLIP and FLAIR score val2017 under the name of COCO: coco-val2017",
        "cra: a caption finds another of its image among all 25,010; cra_second: the first caption finds the second "
        "among the second ones of all images. The paper names neither pool.",
    ),
    cra=True,
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    if text := place.text("coco_karpathy_test.json"):
        return listed(text)
    if text := place.text("coco_test_karpathy.json"):
        return coco(text)
    if paths := place.paths("test/*.tar", "*.tar"):
        return tars(paths)
    raise place.absent()
