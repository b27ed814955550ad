"""What names a caption: the hash of its text; and an index from hashes to rows that stays small for 100 M captions."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16
Hashes = NDArray[np.uint8]


def text_bytes(text: str) -> bytes:
    """A caption as it is stored and hashed: UTF-8; half of a surrogate pair, which UTF-8 cannot hold, becomes "?"."""
    return text.encode("utf-8", errors="replace")


def digest(data: bytes) -> bytes:
    """The first 16 bytes of the SHA-256 of `data`."""
    return hashlib.sha256(data).digest()[:HASH_BYTES]


def as_hashes(digests: list[bytes]) -> Hashes:
    """Digests as an array `[N, 16]`."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, HASH_BYTES)


class HashIndex:
    """From hash to row number, in 32 bytes a hash: sorted runs of doubling size, looked up by bisection.

    Two different hashes that share their first half (one chance in thousands for 100 M captions) may be taken for
    absent: such a caption is stored twice, never given another's row.

    Example:
        >>> index = HashIndex()
        >>> one, other = as_hashes([digest(b"a red disc")]), as_hashes([digest(b"a blue disc")])
        >>> index.insert(one, np.array([7]))
        >>> index.lookup(one).tolist(), index.lookup(other).tolist()
        ([7], [-1])
    """

    def __init__(self) -> None:
        self._runs: list[tuple[NDArray[Any], ...]] = []

    def insert(self, hashes: Hashes, rows: NDArray[np.int64]) -> None:
        """Add hashes `[N, 16]`, none of them present, with their rows `[N]`."""
        if not len(hashes):
            return
        run = _sorted_run(*_halves(hashes), rows)
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            older = self._runs.pop()
            run = _sorted_run(*(np.concatenate(pair) for pair in zip(older, run, strict=True)))
        self._runs.append(run)

    def lookup(self, hashes: Hashes) -> NDArray[np.int64]:
        """The row of each of the hashes `[N, 16]`, -1 for those that are absent."""
        first, second = _halves(hashes)
        found = np.full(len(first), -1, np.int64)
        for keys, checks, rows in self._runs:
            place = np.minimum(np.searchsorted(keys, first), len(keys) - 1)
            hit = (keys[place] == first) & (checks[place] == second)
            found[hit] = rows[place[hit]]
        return found


def _halves(hashes: Hashes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    words = np.ascontiguousarray(hashes).view(np.uint64)
    return words[:, 0].copy(), words[:, 1].copy()


def _sorted_run(first: NDArray[Any], second: NDArray[Any], rows: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    order = np.argsort(first, kind="stable")  # merges presorted runs in linear time
    return first[order], second[order], rows[order]
