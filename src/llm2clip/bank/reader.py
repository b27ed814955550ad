"""Reading a bank: samples, captions, vectors; memory-mapped, cheap to open in every loader process, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from llm2clip.artifacts import read_json, read_manifest
from llm2clip.bank.dtypes import read_dtype, unpack
from llm2clip.bank.hashes import HASH_BYTES, Hashes, HashIndex, as_hashes, digest, text_bytes
from llm2clip.bank.vectors import Layout
from llm2clip.config import check_choice
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import ArtifactError

TABLE = "table"
FACTS = "facts.json"
CAPTION = pa.struct({"kind": pa.dictionary(pa.uint8(), pa.string()), "row": pa.int64()})
SCHEMAS = {
    "samples": pa.schema(
        {
            "id": pa.large_string(),
            "path": pa.dictionary(pa.int32(), pa.large_binary()),  # in the file system's bytes, which may be no UTF-8
            "offset": pa.int64(),
            "length": pa.int64(),
            "column": pa.dictionary(pa.uint16(), pa.string()),
            "captions": pa.large_list(CAPTION),
        }
    ),
    "texts": pa.schema({"text": pa.large_string(), "hash": pa.binary(HASH_BYTES)}),
}
"""The two files of `table/`, each of one record batch, so that a column is one array of the memory map."""
BLOCK_ROWS = 65536
"""Texts or samples read at once, see `blocks`."""


def has_table(folder: Path) -> bool:
    """Whether `folder/table` is there with all its files."""
    return all((folder / TABLE / name).exists() for name in (FACTS, *(f"{name}.arrow" for name in SCHEMAS)))


def read_arrow(folder: Path, name: str) -> pa.RecordBatch:
    """The columns of one of the table's files, memory-mapped.

    Raises:
        ArtifactError: if it is missing or not of its schema.
    """
    path = folder / TABLE / f"{name}.arrow"
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; type the command that made its bank again, it is made anew") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        batch, found = None, " ".join(str(error).split())
    else:
        found = "other columns"
    if batch is None or batch.schema != SCHEMAS[name]:
        raise ArtifactError(f"{path} is damaged ({found}); delete it and type the command that made its bank again")
    return batch


class Table:
    """Samples, where their images lie, and their captions: reads `folder/table`; all is numbered from 0.

    It may be sent to other processes, which map the files for themselves.

    Attributes:
        kinds: names of the kinds, in the order of their codes.
        caption_start: `[num_samples + 1]`; captions of sample i are `caption_start[i] : caption_start[i + 1]`.
        caption_kind: `[num_captions]`, index into `kinds`.
        caption_row: `[num_captions]`, the row of the caption's text and vector.
        image_path: `[num_samples]`, a number for the file that an image lies in; those in one file have the same.
        hashes: `[num_rows, 16]`, of the texts.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = read_json(self.folder / TABLE / FACTS)
        self.kinds, self._columns = list(self.facts["kinds"]), self.facts["columns"]
        samples, texts = (read_arrow(self.folder, name) for name in SCHEMAS)
        self.num_samples, self.num_rows = len(samples), len(texts)
        captions = samples["captions"].values
        self.caption_start = samples["captions"].offsets.to_numpy()
        self.caption_kind = captions.field("kind").indices.to_numpy()
        self.caption_row = captions.field("row").to_numpy()
        self.image_path = samples["path"].indices.to_numpy()
        self._column = samples["column"].indices.to_numpy()
        self._offset, self._length = samples["offset"].to_numpy(), samples["length"].to_numpy()
        self._paths, self._ids, self._texts = samples["path"].dictionary, samples["id"], texts["text"]
        self.hashes: Hashes = np.frombuffer(texts["hash"].buffers()[1], np.uint8).reshape(-1, HASH_BYTES)

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]

    def image(self, sample: int) -> ImageRef:
        """Where the image of a sample lies."""
        return ImageRef(
            path=os.fsdecode(self._paths[self.image_path[sample]].as_py()),
            offset=int(self._offset[sample]),
            length=int(self._length[sample]),
            column=self._columns[self._column[sample]],
        )

    def sample_id(self, sample: int) -> str:
        """The id of a sample, as its source gave it."""
        return str(self._ids[sample])

    def rows(self, sample: int, kind: str | None = None) -> NDArray[np.int64]:
        """The rows of a sample's captions `[n]`, in their order; of one kind only, if given.

        Raises:
            UsageError: if the bank has no such kind.
        """
        start, end = self.caption_start[sample], self.caption_start[sample + 1]
        rows: NDArray[np.int64] = self.caption_row[start:end]
        return rows if kind is None else rows[self.caption_kind[start:end] == self.kind_code(kind)]

    def kind_code(self, kind: str) -> int:
        """The code of a kind in `caption_kind`.

        Raises:
            UsageError: if the bank has no such kind.
        """
        return self.kinds.index(check_choice(f"{self.folder}: kind of caption", kind, self.kinds))

    def text(self, row: int) -> str:
        """The caption of a row."""
        return str(self._texts[row])

    def texts(self, rows: Iterable[int]) -> list[str]:
        """The captions of rows."""
        return [self.text(row) for row in rows]

    @cached_property
    def index(self) -> HashIndex:
        """From the hash of a text to its row."""
        index = HashIndex()
        index.insert(self.hashes, np.arange(self.num_rows))
        return index

    def find(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """The rows of texts `[n]`; -1 for one that is not here."""
        return self.index.lookup(as_hashes([digest(text_bytes(text)) for text in texts]))

    def sample(self, index: int) -> Sample:
        """A sample with its captions' texts."""
        start, end = self.caption_start[index], self.caption_start[index + 1]
        captions: dict[str, tuple[str, ...]] = {}
        for code, row in zip(self.caption_kind[start:end], self.caption_row[start:end], strict=True):
            kind = self.kinds[code]
            captions[kind] = (*captions.get(kind, ()), self.text(row))
        return Sample(self.sample_id(index), self.image(index), captions)

    def iter_texts(self) -> Iterator[tuple[list[bytes], Hashes]]:
        """All texts, encoded, and their hashes, block by block."""
        for block in blocks(self.num_rows):
            texts = self._texts.slice(block.start, len(block)).cast(pa.large_binary())
            yield texts.to_pylist(), self.hashes[block.start : block.stop]


def blocks(length: int) -> Iterator[range]:
    """All numbers below `length`, so many at once that a table is read from one end to the other in flat memory."""
    return (range(first, min(first + BLOCK_ROWS, length)) for first in range(0, length, BLOCK_ROWS))


class Bank(Table):
    """A whole bank, open for reading.

    Attributes:
        folder: where it lies.
        manifest: its `manifest.json`.
        dim: length of a vector, T.
        dtype: how vectors are stored: "float16", "float32", "bfloat16" or "int8".
        vector_dtype: what `vectors` gives: float16, or float32.
        layout: of the files of vectors.
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
        self.manifest: dict[str, Any] = read_manifest(folder, "bank")
        super().__init__(folder)
        self.dim: int = self.manifest["dim"]
        self.dtype: str = self.manifest["dtype"]
        self.vector_dtype = read_dtype(self.dtype)
        self.teacher_fingerprint: str = self.manifest["teacher_fingerprint"]
        self.fingerprint: str = self.manifest["fingerprint"]
        self.layout = Layout(self.folder, self.num_rows, self.manifest["shard_rows"], self.dtype, self.dim)
        # as plain arrays: a memmap's own indexing costs more
        self._arrays = {name: self.layout.open(name).view(np.ndarray) for name in self.layout.arrays}

    @classmethod
    def open(cls, folder: str | Path) -> Bank:
        """The bank in `folder`.

        Raises:
            UsageError: if there is none.
            ArtifactError: if it is unfinished, of an older format, or lacks a file.
        """
        return cls(folder)

    @property
    def table(self) -> Table:
        """Its samples and captions: the bank itself."""
        return self

    def vectors(self, rows: ArrayLike) -> NDArray[Any]:
        """The vectors of rows `[n]`, in any order, as an array of its own `[n, T]`.

        float16 banks give float16, all others float32 (bfloat16 and int8 are converted).

        Raises:
            IndexError: if a row is out of range.
        """
        return unpack(*self.stored(rows), self.dtype)

    def stored(self, rows: ArrayLike) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """The vectors of rows as they are stored `[n, T]`, and int8's scales `[n, blocks]`."""
        return self._gather(rows, "vectors"), self._gather(rows, "scale") if self.dtype == "int8" else None

    def tokens(self, rows: ArrayLike) -> NDArray[np.int32]:
        """How many tokens the teacher read of each caption `[n]`; 0 where it did not tell."""
        return self._gather(rows, "tokens")

    def _gather(self, rows: ArrayLike, name: str) -> NDArray[Any]:
        """Rows of an array, in any order."""
        rows = np.asarray(rows, np.int64).reshape(-1)
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.num_rows):
            raise IndexError(f"rows go from {rows.min()} to {rows.max()}; the bank has {self.num_rows}")
        return np.take(self._arrays[name], rows, axis=0)
