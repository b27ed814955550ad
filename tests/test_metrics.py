"""Scores worked out by hand, against a dense route, and under ties, odd input and any order of the rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llm2clip import metrics
from llm2clip.errors import UsageError
from llm2clip.metrics import (
    caption_retrieval_accuracy,
    match,
    recall_at_k,
    recall_both_ways,
    similarity_profile,
)


def dense_ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One plus the wrong columns at or above each row's best right one, from the whole matrix."""
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    return 1 + ((scores >= best) & ~right).sum(1)


def random_case(seed: int, *, images: int = 30, dim: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image vectors, caption vectors, and the captions' image numbers: one to four captions each, shuffled."""
    generator = np.random.default_rng(seed)
    owner = generator.permutation(np.repeat(np.arange(images), generator.integers(1, 5, images)))
    image = generator.normal(size=(images, dim)).astype(np.float32)
    return image, (image[owner] + generator.normal(size=(len(owner), dim))).astype(np.float32), owner


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_ranks_by_hand() -> None:
    # two images, four captions: cosines of image x (1, 0) are their first numbers, of y (0, 1) their second ones
    captions = np.array([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    owner = ["x", "y", "y", "x"]
    to_text, to_image, *_ = match(np.eye(2), captions, ["x", "y"], owner)
    assert to_text.tolist() == [2, 1]  # x: 1.0 (wrong) > 0.8 (right); y: 1.0 (right)
    assert to_image.tolist() == [2, 1, 2, 1]
    assert recall_at_k(np.eye(2), captions, ["x", "y"], owner, ks=(1, 2)) == {1: 0.5, 2: 1.0}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tile", [(1024, 8192), (7, 5), (1, 1)])
def test_tiled_ranks_equal_dense_ones(monkeypatch: pytest.MonkeyPatch, seed: int, tile: tuple[int, int]) -> None:
    monkeypatch.setattr(metrics, "TILE_ROWS", tile[0])
    monkeypatch.setattr(metrics, "TILE_COLUMNS", tile[1])
    monkeypatch.setattr(metrics, "PAIRS_AT_ONCE", tile[1])
    image, text, owner = random_case(seed)
    scores, right = unit(image) @ unit(text).T, np.arange(len(image))[:, None] == owner
    forward, backward, *_ = match(image, text, np.arange(len(image)), owner)
    assert forward.tolist() == dense_ranks(scores, right).tolist()
    assert backward.tolist() == dense_ranks(scores.T, right.T).tolist()


def test_one_pass_equals_two() -> None:
    image, text, owner = random_case(5)
    ids = np.arange(len(image))
    both = recall_both_ways(image, text, ids, owner)
    assert both == (recall_at_k(image, text, ids, owner), recall_at_k(text, image, owner, ids))


def test_order_type_and_length_of_rows_change_nothing() -> None:
    image, text, owner = random_case(6)
    expected = recall_both_ways(image, text, np.arange(len(image)), owner)
    shuffle = np.random.default_rng(0).permutation(len(text))
    names = [f"image {i}" for i in range(len(image))]
    again = recall_both_ways(
        torch.tensor(image) * 3, torch.tensor(text[shuffle]), names, [names[i] for i in owner[shuffle]]
    )
    assert again == expected


@pytest.mark.parametrize("constant", [np.ones((40, 8)), np.zeros((40, 8))])
def test_a_constant_encoder_scores_nothing(constant: np.ndarray) -> None:
    owner = np.repeat(np.arange(20), 2)
    assert recall_both_ways(constant[:20], constant, np.arange(20), owner) == ({1: 0, 5: 0, 10: 0}, {1: 0, 5: 0, 10: 0})
    assert caption_retrieval_accuracy(constant, owner) == 0
    assert caption_retrieval_accuracy(constant, owner, "second") == 0


def test_equal_rows_tie_whatever_their_place_in_the_product() -> None:
    # 999 copies of one vector of width 1,280: their float32 products with a query differ in the last bits
    vector = np.random.default_rng(0).normal(size=(1, 1280)).astype(np.float32)
    query = vector + 1
    ranks, *_ = match(query, np.repeat(vector, 999, axis=0), [0], np.arange(999), both=False)
    assert ranks.tolist() == [999]


def test_a_tie_between_right_rows_costs_nothing() -> None:
    assert recall_at_k(np.eye(2), np.eye(2)[[0, 0, 1]], [0, 1], [0, 0, 1], ks=(1,)) == {1: 1.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_an_error(bad: float) -> None:
    vectors = np.eye(3)
    vectors[1, 2] = bad
    with pytest.raises(UsageError, match="1 of 3 gallery vectors hold NaN or infinity"):
        recall_at_k(np.eye(3), vectors, [0, 1, 2], [0, 1, 2])


def test_wrong_shapes_and_unanswerable_queries_are_named() -> None:
    with pytest.raises(UsageError, match=r"query vectors have shape \[3, 3\] for 2 ids"):
        recall_at_k(np.eye(3), np.eye(3), [0, 1], [0, 1, 2])
    with pytest.raises(UsageError, match="query vectors have 3 numbers, gallery vectors 2"):
        recall_at_k(np.eye(3), np.eye(2), [0, 1, 2], [0, 1])
    with pytest.raises(UsageError, match="1 of 3 have no right answer, first query 'c'"):
        recall_at_k(np.eye(3), np.eye(3), ["a", "b", "c"], ["a", "b", "b"])
    with pytest.raises(UsageError, match="there are no query vectors"):
        recall_at_k(np.empty((0, 3)), np.eye(3), [], [0, 1, 2])


def test_rows_that_answer_no_query_are_only_distractors_one_way() -> None:
    assert recall_at_k(np.eye(3)[:1], np.eye(3), ["a"], ["a", "b", "c"], ks=(1,)) == {1: 1.0}


def test_cra_by_hand() -> None:
    angle = np.radians([0, 10, 15, 80, 90])  # images a a b b c: each caption's nearest other one is 1 0 1 4 3
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    owner = ["a", "a", "b", "b", "c"]
    # right: caption 0 only; 1 goes to 2 (5 degrees); c has no second caption and is not asked, but distracts
    assert caption_retrieval_accuracy(vectors, owner) == 1 / 4
    # first captions 0 and 15 degrees seek among second ones 10 and 80: both go to 10
    assert caption_retrieval_accuracy(vectors, owner, "second") == 1 / 2


def test_first_captions_seek_among_second_ones_and_not_the_reverse() -> None:
    angle = np.radians([0, 30, 40, 45, 200, 100])
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    owner = ["a", "a", "b", "b", "c", "c"]
    # 0 -> 30, 40 -> 45, 200 -> 100: all right; of the reverse, 30 -> 40 and 100 -> 40 are wrong
    assert caption_retrieval_accuracy(vectors, owner, "second") == 1
    swapped = vectors[[1, 0, 3, 2, 5, 4]]
    assert caption_retrieval_accuracy(swapped, owner, "second") == pytest.approx(1 / 3)


@pytest.mark.parametrize("tile", [1024, 3])
def test_cra_equals_a_dense_route(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(metrics, "TILE_ROWS", tile)
    monkeypatch.setattr(metrics, "TILE_COLUMNS", tile)
    _, text, owner = random_case(9)
    scores = unit(text) @ unit(text).T
    np.fill_diagonal(scores, -np.inf)
    asked = np.bincount(owner)[owner] > 1
    expected = (owner[scores.argmax(1)] == owner)[asked].mean()
    assert caption_retrieval_accuracy(torch.tensor(text), owner.tolist()) == expected


def test_cra_needs_two_captions_of_a_image_and_a_known_pool() -> None:
    with pytest.raises(UsageError, match="none of 2 has two"):
        caption_retrieval_accuracy(np.eye(2), [0, 1])
    with pytest.raises(UsageError, match="pool is 'third'"):
        caption_retrieval_accuracy(np.eye(2), [0, 0], "third")


def test_similarity_profile_by_hand() -> None:
    vectors = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    profile = similarity_profile(vectors, [0, 0, 1, 1], bins=4)
    assert profile["alignment"] == pytest.approx(0)
    # of 6 pairs two coincide (exp 0 = 1), four are at squared distance 2 (exp -4)
    assert profile["uniformity"] == pytest.approx(math.log((2 + 4 * math.exp(-4)) / 6))
    assert profile["edges"] == [-1, -0.5, 0, 0.5, 1]
    assert profile["positive"] == [0, 0, 0, 2]
    assert profile["negative"] == [0, 0, 4, 0]
    assert (profile["positive_mean"], profile["negative_mean"]) == (1, 0)


def test_alignment_and_means_by_hand() -> None:
    angle = np.radians([0, 60, 90, 180])  # images a a b b
    profile = similarity_profile(np.stack([np.cos(angle), np.sin(angle)], axis=1), ["a", "a", "b", "b"], bins=4)
    cosines = {"positive": [0.5, 0.0], "negative": [0.0, -1.0, math.cos(math.pi / 6), -0.5]}
    for name, expected in cosines.items():
        assert profile[f"{name}_mean"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert profile["alignment"] == pytest.approx(((2 - 2 * 0.5) + 2) / 2)  # squared distances 1 and 2
    squared = [2 - 2 * c for c in [*cosines["positive"], *cosines["negative"]]]
    assert profile["uniformity"] == pytest.approx(math.log(np.mean(np.exp(-2 * np.array(squared)))), abs=1e-5)


@pytest.mark.parametrize("tile", [1, 7])
def test_tiles_of_a_similarity_profile_make_no_difference(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    _, text, owner = random_case(4, images=20)
    whole = similarity_profile(text, owner)
    monkeypatch.setattr(metrics, "TILE_ROWS", tile)
    tiled = similarity_profile(text, owner)
    assert tiled == {key: value if isinstance(value, list) else pytest.approx(value) for key, value in whole.items()}


def test_similarity_profile_of_a_large_set_draws_whole_images() -> None:
    _, text, owner = random_case(3, images=100)
    profile = similarity_profile(text, owner, max_captions=60)
    pairs = sum(profile["positive"]) + sum(profile["negative"])
    assert 50 < profile["captions"] <= 60
    assert pairs == profile["captions"] * (profile["captions"] - 1) / 2
    order = np.random.default_rng(5).permutation(100)  # numbers of images, as `owner` meets them
    numbers = {image: number for number, image in enumerate(dict.fromkeys(owner.tolist()))}
    codes = np.array([numbers[image] for image in owner.tolist()])
    room, kept = 60, []
    for image in order:
        count = int((codes == image).sum())
        if count > room:
            break
        room -= count
        kept.append(image)
    drawn = np.isin(codes, kept)
    assert similarity_profile(text, owner, max_captions=60, seed=5) == similarity_profile(text[drawn], owner[drawn])
    assert similarity_profile(text, owner, max_captions=60, seed=5) != profile


def test_a_set_of_exactly_the_limit_is_full() -> None:
    assert similarity_profile(np.eye(6), range(6), max_captions=4)["captions"] == 4


def test_precision_set_for_training_is_put_back() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        recall_at_k(np.eye(3), np.eye(3), [0, 1, 2], [0, 1, 2])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_histograms_by_hand() -> None:
    vectors = np.array([[1, 0], [3, 0], [-1, 0], [0, 2]], np.float32)
    profile = similarity_profile(vectors, ["a", "a", "b", "c"], bins=4)
    assert profile["edges"] == [-1, -0.5, 0, 0.5, 1]
    assert profile["positive"] == [0, 0, 0, 1]  # two alike: 1, in the last bin, which holds its upper edge
    assert profile["negative"] == [2, 0, 3, 0]  # opposite twice: -1; at right angles three times: 0
    assert (profile["positive_mean"], profile["negative_mean"], profile["captions"]) == (1.0, -0.4, 4)
    assert profile["alignment"] == 0
    # distances squared: 0, 4 twice, 2 three times
    wanted = np.log((1 + 2 * np.exp(-8) + 3 * np.exp(-4)) / 6)
    assert profile["uniformity"] == pytest.approx(wanted, abs=1e-6)


def test_ids_may_be_lists_arrays_or_tensors_on_either_side() -> None:
    vectors = np.eye(3, dtype=np.float32)
    sides = ([5, 7, 5], np.array([5, 7, 5]), torch.tensor([5, 7, 5]))
    for first in sides:
        for second in sides:
            ranks, back, *_ = match(vectors[[0, 1, 2]], vectors[[2, 1, 0]], first, second)
            assert ranks.tolist() == back.tolist() == [1, 1, 1]
    assert caption_retrieval_accuracy(vectors[[0, 1, 0]], torch.tensor([5, 7, 5])) == 1.0
