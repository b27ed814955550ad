"""The parts of a report: dataset names, captions as rows, scores by kind, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llm2clip.data.bad import BadImage, BadSamples
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import TooManyBadSamples
from llm2clip.eval.datasets import dataset_name, named_datasets
from llm2clip.eval.encode import encode_captions, encode_images
from llm2clip.eval.report import as_html, as_markdown, histogram


def sample(number: int, **captions: tuple[str, ...]) -> Sample:
    return Sample(str(number), ImageRef(str(number)), captions)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("data/flickr30k.csv", "flickr30k"),
        ("data/shards/*.tar", "shards"),
        ("data/shards/{00000..00012}.tar", "shards"),
        ("/data/images/", "images"),
        ("*.csv", "data"),
        ("hf:org/urban1k", "urban1k"),
        ("hf:org/urban1k:test", "urban1k-test"),
        ("https://host/place/docci.parquet?download=1", "docci"),
        ("s3://bucket/shards/*.tar", "shards"),
    ],
)
def test_dataset_names(spec: str, name: str) -> None:
    assert dataset_name(spec) == name


def test_tars_that_a_shell_listed_are_one_dataset() -> None:
    tars = [f"coco/{i:05d}.tar" for i in range(3)]
    assert named_datasets([*tars, "test.csv"]) == {"coco": tuple(tars), "test": ("test.csv",)}
    assert named_datasets(["coco/00000.tar"]) == {"00000": ("coco/00000.tar",)}


def test_hopeless_images_stop_the_run_after_a_thousand() -> None:
    class AllBad(Numbers):
        def prepare_image(self, image: Any) -> float:
            raise BadImage("empty image", image.path)

    taken: list[int] = []

    def samples() -> Iterator[Sample]:
        for i in range(5000):
            taken.append(i)
            yield sample(i, short=("a",))

    with pytest.raises(TooManyBadSamples, match="1000 of 1000 samples are bad"):
        encode_images(samples(), AllBad(), batch_size=8, bad=BadSamples(0.5, quiet=True), threads=1)
    assert len(taken) <= 1010


class Numbers:
    """An encoder of numbers: an image's vector is its path's number."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def prepare_image(self, image: Any) -> float:
        if int(image.path) % 7 == 3:
            raise BadImage("empty image", image.path)
        return float(image.path)

    def encode_image(self, images: Any, *, batch_size: int = 32) -> np.ndarray:
        self.batches.append(len(images))
        return np.array([[value] for value in images])

    def encode_text(self, texts: Any, *, batch_size: int = 32) -> np.ndarray:
        return np.array([[float(len(text))] for text in texts])


@pytest.mark.parametrize("count", [1, 4, 5, 23])
def test_images_come_in_order_without_the_bad_ones(count: int) -> None:
    encoder, bad = Numbers(), BadSamples(1.0, quiet=True)
    samples = [sample(i, short=("a",)) for i in range(count)]
    good, vectors = encode_images(samples, encoder, batch_size=4, bad=bad, threads=2)
    expected = [i for i in range(count) if i % 7 != 3]
    assert [int(one.id) for one in good] == expected == vectors[:, 0].astype(int).tolist()
    assert bad.num_bad == count - len(expected)
    assert all(size == 4 for size in encoder.batches[:-1])


def test_captions_come_back_in_their_order() -> None:
    texts = ["aaa", "a", "aaaa", "aa"]
    assert encode_captions(texts, Numbers(), batch_size=1)[:, 0].tolist() == [3, 1, 4, 2]


def test_many_captions_go_through_the_encoder_in_parts_longest_first() -> None:
    seen: list[tuple[int, int, int]] = []

    class Noting(Numbers):
        def encode_text(self, texts: Any, *, batch_size: int = 32) -> np.ndarray:
            seen.append((len(texts), len(texts[0]), batch_size))
            return super().encode_text(texts)

    lengths = np.random.default_rng(0).permutation(40) + 1
    vectors = encode_captions(["a" * n for n in lengths], Noting(), batch_size=1)
    assert vectors[:, 0].tolist() == lengths.tolist()
    assert seen == [(16, 40, 1), (16, 24, 1), (8, 8, 1)]


REPORT: dict[str, Any] = {
    "config": {"model": "a|b <c>", "teacher": None, "precision": "auto"},
    "model": {"encoder": "llm2clip", "dim": 24},
    "metrics": {
        **{
            f"d/{kind}/{way}_r@{k}": v
            for kind, way, k, v in (
                ("short", "i2t", 1, 0.11),
                ("short", "i2t", 5, 0.12),
                ("short", "i2t", 10, 0.13),
                ("short", "t2i", 1, 0.21),
                ("short", "t2i", 5, 0.22),
                ("short", "t2i", 10, 0.23),
            )
        },
        "d/cra": 0.31,
        "d/cra_second": 0.32,
        "d/short/cra": 0.33,
    },
    "chance": {"d/short/i2t_r@1": 0.04, "d/short/t2i_r@1": 0.05},
    "datasets": {
        "d": {
            "images": 1234,
            "captions": {"short": 5678},
            "bad": {"num_bad": 3, "counts": {"missing file": 2, "empty caption": 1}},
            "captions_cut": 7,
        }
    },
    "similarity": {
        "d": {
            "alignment": 0.4,
            "uniformity": -1.5,
            "positive_mean": 0.8,
            "negative_mean": None,
            "positive": [0, 0, 2, 6],
            "negative": [4, 1, 0, 0],
            "edges": [-1, -0.5, 0, 0.5, 1],
        }
    },
}


def test_a_page_by_hand() -> None:
    page = as_markdown(REPORT)
    for line in (
        "# Scores of a|b <c>",
        "| model | a\\|b <c> |",
        "| dim | 24 |",
        "Retrieval, % (1,234 images; captions: 5,678 short):",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| short | image → text | 11.0 | 12.0 | 13.0 | 4.000 |",
        "| short | text → image | 21.0 | 22.0 | 23.0 | 5.000 |",
        "| a caption finds another of its image, among all | 31.0 |",
        "| an image's first caption finds its second, among all second ones | 32.0 |",
        "| the same among short captions alone | 33.0 |",
        "| alignment (squared distance of captions of one image) | 0.400 |",
        "| uniformity (lower: more spread out) | -1.500 |",
        "| mean cosine, captions of one image | 0.800 |",
        "| captions longer than the model reads, cut | 7 |",
        "Left out: 3 bad samples:",
        "| missing file | 2 |",
    ):
        assert line in page.splitlines(), line
    assert "different images" not in page, "there is no pair of them"
    html = as_html(REPORT)
    assert "<title>Scores of a|b &lt;c&gt;</title>" in html and "<td>a|b &lt;c&gt;</td>" in html
    assert '<td>short</td><td>image → text</td><td class="number">11.0</td>' in html
    assert "<td>dim</td><td>24</td>" in html


def test_bars_of_the_histogram_by_hand() -> None:
    figure = histogram(REPORT["similarity"]["d"], width=400, height=208)
    found = re.findall(r'class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', figure)
    bars = [(name, *map(float, numbers)) for name, *numbers in found]
    # 100 px a bin with a gap of 1; 100 px from the middle at 104 to the highest bar of either side
    assert bars == [
        ("positive", 200.5, pytest.approx(104 - 33.3, abs=0.1), 99.0, 33.3),
        ("positive", 300.5, 4.0, 99.0, 100.0),
        ("negative", 0.5, 104.0, 99.0, 100.0),
        ("negative", 100.5, 104.0, 99.0, 25.0),
    ]


def test_histogram_has_a_bar_for_each_filled_bin() -> None:
    profile = {"positive": [0, 0, 1, 3], "negative": [5, 0, 0, 0], "edges": [-1, -0.5, 0, 0.5, 1]}
    figure = histogram(profile)
    assert figure.count("<rect") == 3
    assert "positive: 0.50 to 1.00, 75.00 %" in figure
