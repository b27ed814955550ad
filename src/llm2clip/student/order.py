"""Which image is drawn when: a pure function of seed and position, that needs no list of what was drawn before.

A shuffled epoch is a keyed permutation that is computed where it is asked for, not stored: no array of 60 million
numbers in every loader process, and a run that goes on at any step just asks for that step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ROUNDS = 8
"""Feistel rounds of a permutation; more change nothing that `tests/student/test_order.py` can measure."""
SMALL = 4096
"""Up to here a permutation is sorted out as a whole; a Feistel network needs a large range to mix well."""


def key_of(*parts: int | str) -> int:
    """A 64-bit key from numbers and words.

    >>> key_of("order", 0, 1) != key_of("order", 1, 0)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def hashed(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """64 well-mixed bits of each value under a key: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), twice."""
    mixed: NDArray[np.uint64] = values ^ np.uint64(key % 2**64)
    for _ in range(2):
        mixed = mixed + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def uniforms(positions: Ints, count: int, key: int) -> NDArray[np.float64]:
    """`[n, count]` numbers in [0, 1), each a pure function of its position, its column and the key."""
    columns = np.arange(count, dtype=np.uint64)
    cells: NDArray[np.uint64] = positions.astype(np.uint64)[:, None] * np.uint64(count) + columns
    return (hashed(cells, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(positions: Ints, size: int, key: int) -> Ints:
    """Where a permutation of `range(size)`, chosen by `key`, puts positions `[n]`.

    Beyond `SMALL`, a Feistel network over pairs (left, right) of a near-square rectangle of at least `size` cells; what
    falls outside `range(size)` go through it again (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").

    >>> sorted(permuted(np.arange(5), 5, key=7).tolist())
    [0, 1, 2, 3, 4]
    """
    if size <= SMALL:
        return np.argsort(hashed(np.arange(size, dtype=np.uint64), key), kind="stable")[positions]
    height = math.isqrt(size)
    width = -(-size // height)
    out = np.asarray(positions, np.int64).copy()
    pending = np.arange(len(out))
    while len(pending):
        left, right = np.divmod(out[pending].astype(np.uint64), np.uint64(width))
        for number in range(ROUNDS // 2):
            left = (left + hashed(right, key + 2 * number) % np.uint64(height)) % np.uint64(height)
            right = (right + hashed(left, key + 2 * number + 1) % np.uint64(width)) % np.uint64(width)
        out[pending] = (left * np.uint64(width) + right).astype(np.int64)
        pending = pending[out[pending] >= size]
    return out


class Order(Protocol):
    """The order in which one bank's samples are drawn.

    Attributes:
        size: draws of an epoch.
    """

    size: int

    def samples(self, draws: Ints) -> Ints:
        """The samples at draws `[n]`, counted over all epochs."""

    def substitute(self, sample: int, draw: float) -> int:
        """Another sample to take where `sample` cannot be used, chosen by a number in [0, 1)."""


class ShuffledOrder:
    """Every sample once an epoch, each epoch in another random order.

    Args:
        size: samples of the bank.
        seed: source of the order.
        name: tells apart the banks of one run.
    """

    def __init__(self, size: int, *, seed: int, name: str = "") -> None:
        self.size, self.seed, self.name = size, seed, name

    def samples(self, draws: Ints) -> Ints:
        epochs, places = np.divmod(draws, self.size)
        out = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            key = key_of("order", self.seed, self.name, epoch)
            out[here] = permuted(places[here], self.size, key)
        return out

    def substitute(self, sample: int, draw: float) -> int:
        return int(draw * self.size)


class Mixture:
    """Batches drawn from several banks: which bank and which of its samples stand at each place of each batch.

    Places are those of the global batch, whatever number of processes shares it. An epoch is as many draws as all banks
    have samples; what is left of it after the last full batch is dropped (another rest each epoch). With one bank, or
    several by size, no sample comes twice in an epoch. By weights, a bank is drawn at its rate, as often through as
    that takes.

    Args:
        orders: one a bank.
        weights: how often each bank is drawn; None for by size.
        batch_size: places of a batch.
        seed: source of the interleaving.
        epoch: draws among which banks are interleaved, if not as many as all banks have samples.
        number: tells apart the mixtures of one run.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        *,
        weights: Sequence[float] | None = None,
        batch_size: int,
        seed: int,
        epoch: int | None = None,
        number: int = 0,
    ) -> None:
        self.orders, self.batch_size, self.seed, self.number = orders, batch_size, seed, number
        sizes = [order.size for order in orders]
        self.epoch = sum(sizes) if epoch is None else epoch
        quotas = apportion(self.epoch, sizes if weights is None else weights)
        self.quota = np.array(quotas, np.int64)
        self.first = np.cumsum([0, *quotas], dtype=np.int64)

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return self.epoch // self.batch_size

    def draw(self, batch: int, places: Ints) -> tuple[Ints, Ints]:
        """The banks `[n]` and their samples `[n]` at places `[n]` of a batch, numbered on through all epochs."""
        epoch, number = divmod(batch, self.batches_per_epoch)
        cells = number * self.batch_size + places
        if len(self.orders) > 1:
            cells = permuted(cells, self.epoch, key_of("mixture", self.seed, self.number, epoch))
        banks = np.searchsorted(self.first, cells, side="right") - 1
        draws = epoch * self.quota[banks] + cells - self.first[banks]
        samples = np.empty_like(draws)
        for bank in np.unique(banks).tolist():
            here = banks == bank
            samples[here] = self.orders[bank].samples(draws[here])
        return banks, samples


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` whole items shared out by weights, the largest remainders rounded up.

    >>> apportion(10, [0.5, 0.25, 0.25]), apportion(7, [1, 0, 1])
    ([5, 3, 2], [4, 0, 3])
    """
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
