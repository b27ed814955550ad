"""What evaluate reads: dataset names, and a model that encodes a dataset, whose bad images are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llm2clip.data.bad import BadImage, BadSamples
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import TooManyBadSamples
from llm2clip.eval.datasets import dataset_name, named_datasets
from llm2clip.eval.encode import encode_captions, encode_images


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
