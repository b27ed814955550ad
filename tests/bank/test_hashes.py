"""Hashes name captions; the index finds each one's row."""

from __future__ import annotations

import hashlib

import numpy as np

from llm2clip.bank.hashes import HashIndex, as_hashes, digest, text_bytes


def hashes_of(numbers: range) -> np.ndarray:
    return as_hashes([digest(str(i).encode()) for i in numbers])


def test_a_hash_is_the_start_of_sha256() -> None:
    assert digest("圆".encode()) == hashlib.sha256("圆".encode()).digest()[:16]


def test_half_a_surrogate_pair_does_not_stop_a_run() -> None:
    assert text_bytes("a \ud83d disc") == b"a ? disc"


def test_index_finds_what_was_put_in_and_nothing_else() -> None:
    index = HashIndex()
    for first in range(0, 5000, 250):
        index.insert(hashes_of(range(first, first + 250)), np.arange(first, first + 250))
    found = index.lookup(hashes_of(range(4000, 6000)))
    assert found.tolist() == [*range(4000, 5000), *[-1] * 1000]


def test_runs_stay_few() -> None:
    index = HashIndex()
    for i in range(300):
        index.insert(hashes_of(range(i, i + 1)), np.array([i]))
    assert len(index._runs) <= 10
    assert index.lookup(hashes_of(range(300))).tolist() == list(range(300))


def test_an_empty_index_and_an_empty_insert() -> None:
    index = HashIndex()
    index.insert(np.zeros((0, 16), np.uint8), np.zeros(0, np.int64))
    assert index.lookup(hashes_of(range(2))).tolist() == [-1, -1]


def test_equal_first_halves_are_told_apart() -> None:
    one, other = np.zeros((1, 16), np.uint8), np.zeros((1, 16), np.uint8)
    other[0, 15] = 1
    index = HashIndex()
    index.insert(one, np.array([5]))
    assert index.lookup(one).tolist() == [5]
    assert index.lookup(other).tolist() == [-1]
