"""Vectors that other banks of the same teacher hold already: found by their captions' hashes, copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llm2clip.bank.dtypes import Stored, pack
from llm2clip.bank.hashes import Hashes, HashIndex
from llm2clip.bank.load import TeacherFacts
from llm2clip.bank.reader import Bank
from llm2clip.bank.shards import ShardBuffer
from llm2clip.errors import UsageError


class Reuse:
    """Banks to copy vectors from; the first that has a caption gives it.

    Args:
        banks: by the same teacher and prompt, with the same stored dtype or float32.

    Raises:
        UsageError: if a bank does not fit.
    """

    def __init__(self, banks: Sequence[Bank], *, teacher: TeacherFacts, dtype: str) -> None:
        self._banks = list(banks)
        self._indexes = []
        for bank in banks:
            check_same_teacher(bank, teacher)
            if bank.dtype not in (dtype, "float32"):
                raise UsageError(
                    f"{bank.folder} holds {bank.dtype} vectors, which cannot become {dtype} without loss; leave it out"
                )
            index = HashIndex()
            index.insert(np.asarray(bank.table.hashes), np.arange(bank.num_rows))
            self._indexes.append(index)

    def copy(self, hashes: Hashes, buffer: ShardBuffer) -> NDArray[np.int64]:
        """Copy what is known of the captions `[N, 16]` into `buffer`; returns the places of the others."""
        wanted = np.arange(len(hashes))
        for bank, index in zip(self._banks, self._indexes, strict=True):
            rows = index.lookup(hashes[wanted])
            known, rows = wanted[rows >= 0], rows[rows >= 0]
            if len(known):
                buffer.put(known, self._stored(bank, rows, buffer.layout.dtype))
                buffer.tokens[known] = bank.tokens(rows)
                wanted = np.setdiff1d(wanted, known, assume_unique=True)
        return wanted

    @staticmethod
    def _stored(bank: Bank, rows: NDArray[np.int64], dtype: str) -> Stored:
        if bank.dtype == dtype:
            return bank.stored(rows)
        vectors, scale = pack(torch.from_numpy(bank.vectors(rows)), dtype)
        array = vectors.numpy()
        return array.view(np.uint16) if dtype == "bfloat16" else array, None if scale is None else scale.numpy()


def check_same_teacher(bank: Bank, teacher: TeacherFacts) -> None:
    """Check that a bank's vectors can stand beside those of `teacher`.

    Raises:
        UsageError: naming both fingerprints, or both prompts.
    """
    if bank.teacher_fingerprint != teacher.fingerprint:
        raise UsageError(
            f"{bank.folder} was built by another teacher: its fingerprint is {bank.teacher_fingerprint}, that of "
            f"{teacher.name} is {teacher.fingerprint}"
        )
    if bank.manifest["teacher"]["prompt"] != teacher.prompt:
        raise UsageError(
            f"{bank.folder} was built with the prompt {bank.manifest['teacher']['prompt']!r}, not {teacher.prompt!r}"
        )
