"""Retrieval scores as evaluators give them: captions as rows, pools by kind, chance and intervals, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2clip.data.sample import ImageRef, Sample
from llm2clip.protocols import Score
from llm2clip.scores import (
    CaptionRetrieval,
    Captions,
    Retrieval,
    caption_scores,
    chance_of_hit,
    interval,
    retrieval_scores,
)


def sample(number: int, **captions: tuple[str, ...]) -> Sample:
    return Sample(str(number), ImageRef(str(number)), captions)


SAMPLES = [
    sample(0, short=("a dog", "one dog"), long=("a long dog",)),
    sample(1, short=("a cat",), long=("a long cat", "a cat")),
    sample(2, short=("a dog",)),
]


def test_each_distinct_caption_is_one_row() -> None:
    captions = Captions.of(SAMPLES)
    assert captions.texts == ["a dog", "one dog", "a long dog", "a cat", "a long cat"]
    assert captions.rows == {"short": [0, 1, 3, 0], "long": [2, 4, 3]}
    assert captions.owners == {"short": [0, 0, 1, 2], "long": [0, 1, 1]}
    rows, owners = captions.distinct(["short", "long"])
    assert list(zip(owners.tolist(), rows.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (2, 0)]


def test_kinds_have_pools_of_their_own_images() -> None:
    captions = Captions.of(SAMPLES)
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    found = list(retrieval_scores(images, texts, captions))
    scores, chance = ({score.name: score[i] for score in found} for i in (1, 2))
    assert scores["long/i2t_r@1"] == 1 and scores["long/t2i_r@1"] == 1  # image 2 has no long caption
    # short: "a dog" is also image 2's, whose vector is orthogonal to it; image 0 ties with it for its own caption
    assert scores["short/t2i_r@1"] == 3 / 4 and scores["short/i2t_r@1"] == 1 / 3
    assert chance["short/t2i_r@1"] == 1 / 3 and chance["long/t2i_r@10"] == 1
    assert chance["long/t2i_r@1"] == 1 / 2  # two of the three images have a long caption
    assert chance["short/i2t_r@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_caption_scores_by_kind_and_over_all() -> None:
    captions = Captions.of(SAMPLES)
    texts = torch.tensor([[1.0, 0.1, 0], [1, 0.2, 0], [1, 0, 0.3], [0, 1, 0], [0, 1, 0.1]])
    scores = {score.name: score.value for score in caption_scores(texts, captions)}
    assert set(scores) == {"cra", "cra_second", "short/cra", "long/cra"}
    assert scores["long/cra"] == 1  # two captions of the cat, and the dog's is far
    assert list(caption_scores(texts, Captions.of(SAMPLES[2:]))) == []


def test_chance_is_what_random_ranks_give() -> None:
    generator = np.random.default_rng(0)
    hits = [(generator.permutation(12)[:5] < 3).any() for _ in range(20_000)]
    assert chance_of_hit([3], 12, 5) == pytest.approx(np.mean(hits), abs=0.01)
    assert chance_of_hit([3], 4, 10) == 1


def test_caption_scores_by_hand() -> None:
    """Angles of the captions of two images, each with two short ones and a long one."""
    captions = Captions.of([sample(0, short=("a", "b"), long=("A",)), sample(1, short=("c", "d", "c"), long=("C",))])
    angle = np.radians([0, 50, 40, 60, 170, 160])  # of a b A c d C, the order in which they are met
    assert captions.texts == ["a", "b", "A", "c", "d", "C"]
    texts = torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], axis=1))
    # nearest other: a -> A right; b -> A or c, a tie, which counts against it; A -> b right; c -> b wrong; d, C right
    # first to second: a seeks among b (50) and d (170): right; c (60): b is nearer than d: wrong
    # short alone: a -> b right; b -> c wrong; c -> b wrong; d -> c right; no image has two long ones
    expected = {"cra": 4 / 6, "cra_second": 1 / 2, "short/cra": 2 / 4}
    found = list(caption_scores(texts, captions))
    assert {score.name: score.value for score in found} == pytest.approx(expected)
    # of the five others two are right; one of two second captions; among short ones one of three
    by_chance = {"cra": 2 / 5, "cra_second": 1 / 2, "short/cra": 1 / 3}
    assert {score.name: score.chance for score in found} == pytest.approx(by_chance)
    assert {score.num_images for score in found} == {2}
    alone = Captions.of([sample(0, short=("a", "b")), sample(1, short=("c", "d"))])
    names = [score.name for score in caption_scores(texts[[0, 1, 3, 4]], alone)]
    assert names == ["cra", "cra_second"], "one kind is all there is"


def test_retrieval_scores_at_every_k_are_those_of_dense_ranks() -> None:
    rng = np.random.default_rng(0)
    samples = [sample(i, short=tuple(f"{i} {j}" for j in range(i % 3 + 1))) for i in range(20)]
    captions = Captions.of(samples)
    owners = np.array(captions.owners["short"])
    images = torch.from_numpy(rng.normal(size=(20, 4)))
    texts = images[owners] + torch.from_numpy(rng.normal(size=(len(owners), 4)))
    found = list(retrieval_scores(images, texts, captions))
    scores, chance = ({score.name: score[i] for score in found} for i in (1, 2))
    unit = [torch.nn.functional.normalize(v, dim=1).numpy() for v in (images, texts)]
    cosines, right = unit[0] @ unit[1].T, np.arange(20)[:, None] == owners
    for way, matrix, own in (("i2t", cosines, right), ("t2i", cosines.T, right.T)):
        best = np.where(own, matrix, -2).max(1, keepdims=True)
        ranks = 1 + ((matrix >= best) & ~own).sum(1)
        assert [scores[f"short/{way}_r@{k}"] for k in (1, 5, 10)] == [(ranks <= k).mean() for k in (1, 5, 10)]
    assert [chance[f"short/t2i_r@{k}"] for k in (1, 5, 10)] == [1 / 20, 5 / 20, 10 / 20]
    assert scores["short/i2t_r@5"] != scores["short/t2i_r@5"], "the directions are not told apart"


def test_captions_keep_their_order_within_a_sample() -> None:
    captions = Captions.of([sample(0, short=("b",), long=("a", "b")), sample(1, short=("a",))])
    rows, owners = captions.distinct(["long", "short"])
    assert [captions.texts[row] for row in rows] == ["a", "b", "a"] and owners.tolist() == [0, 0, 1]


def test_an_interval_by_hand() -> None:
    """Wilson's formula for 7 of 20, worked out: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    assert interval(0.35, 20) == pytest.approx((0.181192, 0.567146), abs=1e-5)
    assert interval(1.0, 4) == pytest.approx((4 / (4 + 1.959964**2), 1.0))
    assert interval(0.0, 4) == pytest.approx((0.0, 1.959964**2 / (4 + 1.959964**2)))


class Table:
    """An encoder whose vectors are written down: of images by id, of texts by text; image 1 cannot be read."""

    def images(self, samples: list[Sample]) -> tuple[list[int], torch.Tensor]:
        readable = [i for i, one in enumerate(samples) if one.id != "1"]
        return readable, torch.eye(3)[[int(samples[i].id) for i in readable]]

    def texts(self, texts: list[str]) -> torch.Tensor:
        assert not {"a cat", "a long cat"} & set(texts), "captions of an image that cannot be read"
        return torch.stack([torch.eye(3)[2] if text == "a dog" else torch.eye(3)[0] for text in texts])


def test_retrieval_leaves_out_what_cannot_be_read() -> None:
    """Images 0 and 2 are left; "a dog" is a caption of both and lies on image 2; "a long dog" on its own image 0."""
    assert list(Retrieval(SAMPLES, ks=(1,)).run(Table())) == [
        Score("short/i2t_r@1", 1 / 2, pytest.approx((2 / 3 + 1 / 3) / 2), 2),  # image 2 ties with "a dog" of image 0
        Score("short/t2i_r@1", pytest.approx(2 / 3), 1 / 2, 2),
        Score("long/i2t_r@1", 1.0, 1.0, 1),
        Score("long/t2i_r@1", 1.0, 1.0, 1),
    ]


def test_caption_retrieval_needs_no_images() -> None:
    class Texts:
        def texts(self, texts: list[str]) -> torch.Tensor:
            return torch.eye(2)[[0 if text.startswith("red") else 1 for text in texts]]

    samples = [sample(0, short=("red disc",), long=("red square",)), sample(1, short=("a",), long=("b",))]
    found = {score.name: score.value for score in CaptionRetrieval(samples).run(Texts())}
    assert found == {"cra": 1.0, "cra_second": 1.0}
