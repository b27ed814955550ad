"""Vectors that other banks of the same teacher hold already: found by their captions' hashes, copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llm2clip.bank.dtypes import Stored, pack
from llm2clip.bank.hashes import Hashes
from llm2clip.bank.load import TeacherFacts
from llm2clip.bank.reader import Bank
from llm2clip.bank.vectors import ShardBuffer
from llm2clip.errors import UsageError, setting


class Reuse:
    """Banks to copy vectors from; the first that has a caption gives it.

    Args:
        banks: such as `check_reuse` lets pass.
    """

    def __init__(self, banks: Sequence[Bank]) -> None:
        self._banks, self.limit = list(banks), limit_of(banks)

    def copy(self, hashes: Hashes, buffer: ShardBuffer) -> NDArray[np.int64]:
        """Copy what is known of the captions `[N, 16]` into `buffer`; returns the places of the others."""
        wanted = np.arange(len(hashes))
        for bank in self._banks:
            rows = bank.index.lookup(hashes[wanted])
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


def limit_of(banks: Sequence[Bank]) -> int | None:
    """Tokens that the teacher read of a caption, as banks say; None if none does."""
    return next((limit for bank in banks if (limit := bank.manifest.get("cut", {}).get("limit"))), None)


def teacher_of(bank: Bank) -> TeacherFacts:
    """What a bank's manifest says of its teacher."""
    return TeacherFacts(**bank.manifest["teacher"])


def find_teacher(bank: Bank, name: str | None) -> tuple[str, str | None]:
    """Folder or Hub id of a bank's teacher, and the revision if it is a pinned one.

    Args:
        name: where it lies, if not where it did when the bank was built; the revision recorded is none of this name's.
    """
    recorded = teacher_of(bank)
    return (name, None) if name not in (None, recorded.name) else (recorded.name, recorded.revision)


def check_reuse(banks: Sequence[Bank], teacher: TeacherFacts, dtype: str) -> None:
    """Check that the vectors of banks can be copied to one by `teacher` that stores `dtype`.

    Raises:
        UsageError: if a bank is by another teacher, prompt or precision, or cannot become `dtype` without loss.
    """
    for bank in banks:
        precision = setting("precision", teacher_of(bank).precision)
        check_same_teacher(bank, teacher, remedy=f"give {precision}, or leave it out of {setting('reuse')}")
        if bank.dtype not in (dtype, "float32"):
            raise UsageError(
                f"{bank.folder} holds {bank.dtype} vectors, which cannot become {dtype} without loss; leave it out"
            )


def check_same_teacher(bank: Bank, teacher: TeacherFacts, *, remedy: str = "") -> None:
    """Check that a bank's vectors can stand beside those of `teacher`: one teacher, prompt and precision.

    Args:
        remedy: what to type if the precision is another.

    Raises:
        UsageError: naming both fingerprints, prompts or precisions.
    """
    own = teacher_of(bank)
    if own.fingerprint != teacher.fingerprint:
        raise UsageError(
            f"{bank.folder} was built by another teacher: its fingerprint is {own.fingerprint}, that of "
            f"{teacher.name} is {teacher.fingerprint}"
        )
    if own.prompt != teacher.prompt:
        raise UsageError(f"{bank.folder} was built with the prompt {own.prompt!r}, not {teacher.prompt!r}")
    if own.precision != teacher.precision:
        raise UsageError(
            f"{bank.folder} was built in {own.precision}, not {teacher.precision}: a bank holds vectors of one "
            f"precision; {remedy}"
        )
