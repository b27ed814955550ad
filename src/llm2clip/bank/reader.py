"""Reading a bank: samples, rows, vectors; memory-mapped, cheap to open in every loader process, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm2clip.artifacts import read_manifest
from llm2clip.bank.dtypes import STORED, num_blocks, read_dtype, unpack
from llm2clip.bank.span import Span
from llm2clip.bank.table import Table
from llm2clip.data.sample import PictureRef, Sample
from llm2clip.errors import ArtifactError

VECTORS = "vectors"


class Bank:
    """A whole bank, open for reading; may be sent to other processes, which map the files for themselves.

    Attributes:
        folder: where it lies.
        manifest: its `manifest.json`.
        table: samples and captions (`llm2clip.bank.table.Table`).
        dim: length of a vector, T.
        dtype: how vectors are stored: "float16", "float32", "bfloat16" or "int8".
        vector_dtype: what `vectors` gives: float16, or float32.
        num_samples: samples.
        num_rows: distinct captions.
        kinds: names of the kinds of caption.
        teacher_fingerprint: of the teacher that made the vectors.
        fingerprint: of everything in the bank.

    Example:
        >>> bank = Bank.open("bank")                                                    # doctest: +SKIP
        >>> rows = bank.rows(0, "short")                                                # doctest: +SKIP
        >>> bank.text(rows[0]), bank.vectors(rows).shape                                # doctest: +SKIP
        ('a red disc', (1, 4096))
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_manifest(folder, "bank")
        self.table = Table(folder)
        self.dim: int = self.manifest["dim"]
        self.dtype: str = self.manifest["dtype"]
        self.vector_dtype = read_dtype(self.dtype)
        self.num_samples, self.num_rows, self.kinds = self.table.num_samples, self.table.num_rows, self.table.kinds
        self.teacher_fingerprint: str = self.manifest["teacher_fingerprint"]
        self.fingerprint: str = self.manifest["fingerprint"]
        self._shards = self.manifest["shards"]
        self._start = np.cumsum([0, *(shard["rows"] for shard in self._shards)], dtype=np.int64)
        self._spans: dict[str, Span] = {}
        if self._start[-1] != self.num_rows:
            raise ArtifactError(
                f"{folder} has {self._start[-1]} vectors for {self.num_rows} captions; delete its manifest.json and "
                "type the command that made it again"
            )

    @classmethod
    def open(cls, folder: str | Path) -> Bank:
        """The bank in `folder`.

        Raises:
            UsageError: if there is none.
            ArtifactError: if it is unfinished or lacks a file.
        """
        return cls(folder)

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]

    def picture(self, sample: int) -> PictureRef:
        """Where the picture of a sample lies."""
        return self.table.picture(sample)

    def sample_id(self, sample: int) -> str:
        """The id of a sample, as its source gave it."""
        return self.table.sample_id(sample)

    def sample(self, sample: int) -> Sample:
        """A sample with its captions' texts."""
        return self.table.sample(sample)

    def rows(self, sample: int, kind: str | None = None) -> NDArray[np.int64]:
        """The rows of a sample's captions `[n]`, in their order; of one kind only, if given.

        Raises:
            UsageError: if the bank has no such kind.
        """
        return self.table.rows(sample, kind)

    def text(self, row: int) -> str:
        """The caption of a row."""
        return self.table.text(row)

    def vectors(self, rows: ArrayLike) -> NDArray[Any]:
        """The vectors of rows `[n]`, in any order, as an array of its own `[n, T]`.

        float16 banks give float16, all others float32 (bfloat16 and int8 are converted).

        Raises:
            IndexError: if a row is out of range.
        """
        return unpack(*self.stored(rows), self.dtype)

    def stored(self, rows: ArrayLike) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """The vectors of rows as they are stored `[n, T]`, and int8's scales `[n, blocks]`."""
        vectors = self._gather(rows, "vectors")
        return vectors, self._gather(rows, "scale") if self.dtype == "int8" else None

    def tokens(self, rows: ArrayLike) -> NDArray[np.int32]:
        """How many tokens the teacher read of each caption `[n]`; 0 where it did not tell."""
        return self._gather(rows, "tokens")

    def _gather(self, rows: ArrayLike, part: str) -> NDArray[Any]:
        """Rows of one part of the shards ("vectors", "scale", "tokens"), in any order."""
        rows = np.asarray(rows, np.int64).reshape(-1)
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.num_rows):
            raise IndexError(f"rows go from {rows.min()} to {rows.max()}; the bank has {self.num_rows}")
        return self._span(part).take(rows)

    def _span(self, part: str) -> Span:
        if part not in self._spans:
            files = [self.folder / shard["files"][part]["file"] for shard in self._shards]
            lengths = [shard["rows"] for shard in self._shards]
            dtype, row_shape = self._part(part)
            self._spans[part] = Span(files, lengths, dtype=dtype, row_shape=row_shape)
        return self._spans[part]

    def _part(self, part: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a row of one part of the shards."""
        return {
            "vectors": (STORED[self.dtype], (self.dim,)),
            "scale": ("float32", (num_blocks(self.dim),)),
            "tokens": ("int32", ()),
        }[part]

    def shard_rows(self, shard: int) -> range:
        """The rows in one shard."""
        return range(int(self._start[shard]), int(self._start[shard + 1]))

    @property
    def num_shards(self) -> int:
        """Files of vectors."""
        return len(self._shards)
