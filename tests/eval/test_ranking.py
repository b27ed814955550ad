"""Average precision, nDCG, intervals and differences: against loops, against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm2clip.eval.ranking import (
    average_precision,
    by_image,
    differences,
    differences_of,
    draws,
    intervals,
    mean_of,
    mean_per_class,
    ndcg,
    places,
    value,
)
from llm2clip.metrics import match
from llm2clip.protocols import Score


def by_loop(scores: np.ndarray, right: np.ndarray, k: int = 10) -> tuple[list[float], list[float]]:
    """AP@k and nDCG@k of each row, the list sorted one by one; wrong ones of equal score first."""
    precisions, gains = [], []
    for row, own in zip(scores, right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], own[j]))
        hits, total, gain = 0, 0.0, 0.0
        for place, j in enumerate(order[:k], 1):
            if own[j]:
                hits += 1
                total += hits / place
                gain += 1 / math.log2(1 + place)
        most = min(int(own.sum()), k)
        precisions.append(total / most)
        gains.append(gain / sum(1 / math.log2(1 + place) for place in range(1, most + 1)))
    return precisions, gains


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_and_ndcg_equal_a_loop(ties: bool) -> None:
    generator = np.random.default_rng(1)
    owners = np.sort(np.concatenate([np.arange(30), generator.integers(0, 30, 150)]))
    images, texts = (generator.standard_normal((n, 4)).astype(np.float32) for n in (30, 180))
    if ties:  # few values: many cosines are equal
        images, texts = np.round(images[:, :2]), np.round(texts[:, :2]) + np.array([1e-3, 0])
        images[0] = [1, 1]
    found = match(images, texts, np.arange(30), owners, rivals=10)
    images, texts = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (images, texts))
    scores = (images @ texts.T).astype(np.float64).round(5)
    precisions, gains = by_loop(scores, owners[None] == np.arange(30)[:, None])
    stand = places(found.rivals, found.owners, found.cosines)
    assert average_precision(stand, found.owners, 30) == pytest.approx(precisions)
    assert ndcg(stand, found.owners, 30) == pytest.approx(gains)
    assert 0 < np.mean(precisions) < 1
    ranks, back, *_ = match(images, texts, np.arange(30), owners)
    assert found.ranks.tolist() == ranks.tolist() and found.ranks_back.tolist() == back.tolist()


def test_recall_equals_clip_benchmarks() -> None:
    """Several captions an image, no ties: the field's own function gives the same."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="pip install 'llm2clip[metrics]'")
    import torch

    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(300) // 3
    images = torch.nn.functional.normalize(torch.randn(100, 8, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(images[owners] + torch.randn(300, 8, generator=generator), dim=1)
    found = match(images, texts, torch.arange(100), owners)
    scores, right = texts @ images.T, owners[:, None] == torch.arange(100)
    for k in (1, 5, 10):
        to_image = (theirs.recall_at_k(scores, right, k) > 0).float().mean().item()
        to_text = (theirs.recall_at_k(scores.T, right.T, k) > 0).float().mean().item()
        assert (found.ranks_back <= k).mean() == pytest.approx(to_image)
        assert (found.ranks <= k).mean() == pytest.approx(to_text)
        assert 0.05 < to_text < 1


def covered(sets: int, *, images: int = 150, seed: int = 0) -> float:
    """How often the interval of text to image recall holds the true one; captions of one image go together."""
    generator = np.random.default_rng(seed)
    easy = generator.beta(3, 2, size=(sets, images))  # how often an image's captions find it: 0.6 in the mean
    hits = generator.random((sets, images, 5)) < easy[..., None]
    counts = np.full(images, 5.0)
    bounds = [intervals([(own.sum(1), counts)], seed=i, count=400)[0] for i, own in enumerate(hits)]
    return float(np.mean([low <= 0.6 <= high for low, high in bounds]))


def test_intervals_hold_the_truth() -> None:
    assert 0.90 <= covered(150) <= 0.99


@pytest.mark.slow
def test_intervals_hold_the_truth_95_times_in_a_hundred() -> None:
    assert 0.93 <= covered(1000) <= 0.97


def test_captions_of_one_image_are_drawn_together() -> None:
    """If captions hit or miss by image, five of them tell no more than one."""
    hits = np.repeat(np.arange(200) % 2, 5).astype(float)
    together = intervals([by_image(hits, np.arange(1000) // 5, 200)])[0]
    alone = intervals([by_image(hits, np.arange(1000), 1000)])[0]
    assert together[1] - together[0] == pytest.approx(math.sqrt(5) * (alone[1] - alone[0]), rel=0.15)


def test_a_difference_on_the_same_images_is_surer_than_two_intervals() -> None:
    generator = np.random.default_rng(0)
    hard, counts = generator.random(500), np.ones(500)
    better, worse = ((hard < share).astype(float) for share in (0.55, 0.50))
    found = differences([(better, counts)], [(worse, counts)])[0]
    apart = intervals([(better, counts), (worse, counts)])
    assert apart[0][0] < apart[1][1], "the intervals alone tell nothing"
    assert found["low"] > 0 and found["p"] <= 0.01
    assert found["difference"] == pytest.approx(better.mean() - worse.mean(), abs=1e-6)
    noise = generator.permutation(better)
    assert differences([(better, counts)], [(noise, counts)])[0]["p"] > 0.3


def test_differences_are_of_scores_that_both_have() -> None:
    shares = (np.ones(4), np.ones(4))
    ours = [Score("a", 1.0, shares=shares), Score("b", 1.0, shares=shares), Score("c", 0.5)]
    assert list(differences_of(ours, [Score("a", 1.0, shares=shares), Score("c", 0.5)])) == ["a"]
    assert differences_of(ours, []) == {}


def test_draws_are_the_same_for_a_seed_whatever_fits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2clip.eval import ranking

    shares = (np.arange(50.0), np.ones(50))
    whole = draws([shares], count=20)
    monkeypatch.setattr(ranking, "AT_ONCE", 150)
    assert draws([shares], count=20) == pytest.approx(whole)
    assert draws([shares], seed=1, count=20) != pytest.approx(whole)


def test_means_of_scores_are_those_of_their_shares() -> None:
    generator = np.random.default_rng(0)
    parts = [(generator.random(40), np.full(40, count)) for count in (1.0, 2.0, 5.0)]
    assert value(mean_of(parts)) == pytest.approx(np.mean([value(part) for part in parts]))
    classes, hits = generator.integers(0, 7, 300), generator.random(300) < 0.4
    each = [hits[classes == one].mean() for one in np.unique(classes)]
    assert value(mean_per_class(hits, classes)) == pytest.approx(np.mean(each))
