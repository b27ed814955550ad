"""The parts of a report: dataset names, captions as rows, scores by kind, tables and figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.data.bad import BadPicture, BadSamples
from llm2clip.data.sample import PictureRef, Sample
from llm2clip.eval.datasets import dataset_name, named_datasets
from llm2clip.eval.encode import Captions, encode_captions, encode_pictures
from llm2clip.eval.report import histogram
from llm2clip.eval.scores import caption_scores, chance_of_hit, retrieval_scores


def sample(number: int, **captions: tuple[str, ...]) -> Sample:
    return Sample(str(number), PictureRef(str(number)), captions)


SAMPLES = [
    sample(0, short=("a dog", "one dog"), long=("a long dog",)),
    sample(1, short=("a cat",), long=("a long cat", "a cat")),
    sample(2, short=("a dog",)),
]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("data/flickr30k.csv", "flickr30k"),
        ("data/shards/*.tar", "shards"),
        ("data/shards/{00000..00012}.tar", "shards"),
        ("/data/pictures/", "pictures"),
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


def test_each_distinct_caption_is_one_row() -> None:
    captions = Captions.of(SAMPLES)
    assert captions.texts == ["a dog", "one dog", "a long dog", "a cat", "a long cat"]
    assert captions.rows == {"short": [0, 1, 3, 0], "long": [2, 4, 3]}
    assert captions.owners == {"short": [0, 0, 1, 2], "long": [0, 1, 1]}
    rows, owners = captions.distinct(["short", "long"])
    assert list(zip(owners.tolist(), rows.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (2, 0)]


def test_kinds_have_pools_of_their_own_pictures() -> None:
    captions = Captions.of(SAMPLES)
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    scores, chance = retrieval_scores(images, texts, captions)
    assert scores["long/i2t_r@1"] == 1 and scores["long/t2i_r@1"] == 1  # picture 2 has no long caption
    # short: "a dog" is also picture 2's, whose vector is orthogonal to it; picture 0 ties with it for its own caption
    assert scores["short/t2i_r@1"] == 3 / 4 and scores["short/i2t_r@1"] == 1 / 3
    assert chance["short/t2i_r@1"] == 1 / 3 and chance["long/t2i_r@10"] == 1
    assert chance["short/i2t_r@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_caption_scores_by_kind_and_over_all() -> None:
    captions = Captions.of(SAMPLES)
    texts = torch.tensor([[1.0, 0.1, 0], [1, 0.2, 0], [1, 0, 0.3], [0, 1, 0], [0, 1, 0.1]])
    scores = caption_scores(texts, captions)
    assert set(scores) == {"cra", "cra_second", "short/cra", "long/cra"}
    assert scores["long/cra"] == 1  # two captions of the cat, and the dog's is far
    assert caption_scores(texts, Captions.of(SAMPLES[2:])) == {}


def test_chance_is_what_random_ranks_give() -> None:
    generator = np.random.default_rng(0)
    hits = [(generator.permutation(12)[:5] < 3).any() for _ in range(20_000)]
    assert chance_of_hit([3], 12, 5) == pytest.approx(np.mean(hits), abs=0.01)
    assert chance_of_hit([3], 4, 10) == 1


class Numbers:
    """An encoder of numbers: a picture's vector is its path's number."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def prepare_image(self, picture: Any) -> float:
        if int(picture.path) % 7 == 3:
            raise BadPicture("empty picture", picture.path)
        return float(picture.path)

    def encode_image(self, pictures: Any, *, batch_size: int = 32) -> np.ndarray:
        self.batches.append(len(pictures))
        return np.array([[value] for value in pictures])

    def encode_text(self, texts: Any, *, batch_size: int = 32) -> np.ndarray:
        return np.array([[float(len(text))] for text in texts])


@pytest.mark.parametrize("count", [1, 4, 5, 23])
def test_pictures_come_in_order_without_the_bad_ones(count: int) -> None:
    encoder, bad = Numbers(), BadSamples(1.0, quiet=True)
    samples = [sample(i, short=("a",)) for i in range(count)]
    good, vectors = encode_pictures(samples, encoder, batch_size=4, bad=bad, threads=2)
    expected = [i for i in range(count) if i % 7 != 3]
    assert [int(one.id) for one in good] == expected == vectors[:, 0].astype(int).tolist()
    assert bad.num_bad == count - len(expected)
    assert all(size == 4 for size in encoder.batches[:-1])


def test_captions_come_back_in_their_order() -> None:
    texts = ["aaa", "a", "aaaa", "aa"]
    assert encode_captions(texts, Numbers(), batch_size=1)[:, 0].tolist() == [3, 1, 4, 2]


def test_histogram_has_a_bar_for_each_filled_bin() -> None:
    profile = {"positive": [0, 0, 1, 3], "negative": [5, 0, 0, 0], "edges": [-1, -0.5, 0, 0.5, 1]}
    figure = histogram(profile)
    assert figure.count("<rect") == 3
    assert "positive: 0.50 to 1.00, 75.00 %" in figure
