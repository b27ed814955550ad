"""The table of a bank: samples, where their pictures lie, their captions' kinds, rows and texts; memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2clip.artifacts import read_json
from llm2clip.bank.hashes import Hashes, HashIndex, as_hashes, digest
from llm2clip.config import check_choice
from llm2clip.data.sample import PictureRef, Sample
from llm2clip.errors import ArtifactError

TABLE = "table"
FACTS = "facts.json"
BLOCK_ROWS = 65536
"""Texts or samples read at once when a table is read from one end to the other."""


def load_array(path: Path) -> NDArray[Any]:
    """A .npy file, memory-mapped; an empty one, which cannot be mapped, is read.

    Raises:
        ArtifactError: if it is missing or no .npy file.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; type the command that made its bank again, it is made anew") from None
    except (ValueError, EOFError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}); delete it and type the command that made its bank again"
        ) from None
    return array


def has_table(folder: Path) -> bool:
    """Whether `folder/table` is there with all its files."""
    if not (folder / TABLE / FACTS).exists():
        return False
    return all((folder / TABLE / name).exists() for name in read_json(folder / TABLE / FACTS)["files"])


class Table:
    """Reads `folder/table`; samples and rows are numbered from 0.

    Attributes:
        kinds: names of the kinds, in the order of their codes.
        caption_start: `[num_samples + 1]`; captions of sample i are `caption_start[i] : caption_start[i + 1]`.
        caption_kind: `[num_captions]`, index into `kinds`.
        caption_row: `[num_captions]`, the row of the caption's text and vector.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = read_json(self.folder / TABLE / FACTS)
        self.num_samples: int = self.facts["num_samples"]
        self.num_rows: int = self.facts["num_rows"]
        self.kinds = list(self.facts["kinds"])
        self.caption_start, self.caption_kind, self.caption_row = map(
            self._load, ("caption_start", "caption_kind", "caption_row")
        )
        self._columns = self.facts["columns"]
        self._pictures = {name: self._load(f"picture_{name}") for name in ("path", "offset", "length", "column")}
        self._paths, self._ids, self._texts = map(self._texts_of, ("path", "id", "text"))
        self.hashes = self._load("hash")

    def _load(self, name: str) -> NDArray[Any]:
        return load_array(self.folder / TABLE / f"{name}.npy").view(np.ndarray)  # a memmap's own indexing costs more

    def _texts_of(self, name: str) -> Texts:
        return Texts(self._load(name), self._load(f"{name}_start"))

    def picture(self, sample: int) -> PictureRef:
        """Where the picture of a sample lies."""
        return PictureRef(
            path=os.fsdecode(self._paths[self._pictures["path"][sample]]),
            offset=int(self._pictures["offset"][sample]),
            length=int(self._pictures["length"][sample]),
            column=self._columns[self._pictures["column"][sample]],
        )

    @property
    def picture_path(self) -> NDArray[Any]:
        """`[num_samples]`: a number for the file that a sample's picture lies in; those in one file have the same."""
        return self._pictures["path"]

    def sample_id(self, sample: int) -> str:
        """The id of a sample, as its source gave it."""
        return self._ids[sample].decode()

    def rows(self, sample: int, kind: str | None = None) -> NDArray[np.int64]:
        """The rows of a sample's captions `[n]`, in their order; of one kind only, if given.

        Raises:
            UsageError: if the bank has no such kind.
        """
        start, end = self.caption_start[sample], self.caption_start[sample + 1]
        rows: NDArray[np.int64] = np.asarray(self.caption_row[start:end])
        if kind is None:
            return rows
        return rows[self.caption_kind[start:end] == self.kind_code(kind)]

    def kind_code(self, kind: str) -> int:
        """The code of a kind in `caption_kind`.

        Raises:
            UsageError: if the bank has no such kind.
        """
        return self.kinds.index(check_choice(f"{self.folder}: kind of caption", kind, self.kinds))

    def text(self, row: int) -> str:
        """The caption of a row."""
        return self._texts[row].decode()

    def texts(self, rows: Iterable[int]) -> list[str]:
        """The captions of rows."""
        return [self.text(row) for row in rows]

    def sample(self, index: int) -> Sample:
        """A sample with its captions' texts."""
        start, end = self.caption_start[index], self.caption_start[index + 1]
        captions: dict[str, tuple[str, ...]] = {}
        for code, row in zip(self.caption_kind[start:end], self.caption_row[start:end], strict=True):
            kind = self.kinds[code]
            captions[kind] = (*captions.get(kind, ()), self.text(row))
        return Sample(self.sample_id(index), self.picture(index), captions)

    def iter_texts(self) -> Iterator[tuple[list[bytes], Hashes]]:
        """All texts, encoded, and their hashes, block by block."""
        for first in range(0, self.num_rows, BLOCK_ROWS):
            block = range(first, min(first + BLOCK_ROWS, self.num_rows))
            yield [self._texts[row] for row in block], np.asarray(self.hashes[first : block.stop])


class Texts:
    """Texts in one blob: text i is the bytes from `start[i]` to `start[i + 1]`."""

    def __init__(self, blob: NDArray[np.uint8], start: NDArray[np.int64]) -> None:
        self.blob, self.start = blob, start

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self.start) - 1:
            raise IndexError(f"{index} is not below {len(self.start) - 1}")
        return self.blob[self.start[index] : self.start[index + 1]].tobytes()


def joined(tables: list[Table]) -> Iterator[Sample]:
    """The samples of several tables one after another; captions of one picture are gathered in its first sample."""
    indexes = [picture_index(table) for table in tables[1:]]
    taken = [np.zeros(table.num_samples, bool) for table in tables]
    for number, table in enumerate(tables):
        for block in _blocks(table.num_samples):
            hashes = picture_hashes(table, block)
            matches = {later: indexes[later - 1].lookup(hashes) for later in range(number + 1, len(tables))}
            for place, i in enumerate(block):
                if taken[number][i]:
                    continue
                sample = table.sample(i)
                for later, found in matches.items():
                    if (j := found[place]) >= 0 and not taken[later][j]:
                        taken[later][j] = True
                        sample = with_captions(sample, tables[later].sample(j))
                yield sample


def with_captions(sample: Sample, other: Sample) -> Sample:
    """`sample` with the captions of `other` that it does not have already.

    >>> a = Sample("a", PictureRef("a.jpg"), {"short": ("a disc",)})
    >>> b = Sample("b", PictureRef("a.jpg"), {"short": ("a disc", "one disc"), "zh": ("圆",)})
    >>> dict(with_captions(a, b).captions)
    {'short': ('a disc', 'one disc'), 'zh': ('圆',)}
    """
    captions = dict(sample.captions)
    for kind, texts in other.captions.items():
        have = captions.get(kind, ())
        captions[kind] = (*have, *(text for text in texts if text not in have))
    return Sample(sample.id, sample.picture, captions)


def picture_index(table: Table) -> HashIndex:
    """From the hash of where a picture lies to its (first) sample."""
    index = HashIndex()
    for block in _blocks(table.num_samples):
        hashes, first = np.unique(picture_hashes(table, block), axis=0, return_index=True)
        new = index.lookup(hashes) < 0
        index.insert(hashes[new], first[new] + block.start)
    return index


def picture_hashes(table: Table, samples: range) -> Hashes:
    """The hash of where each sample's picture lies."""
    pictures = (table.picture(i) for i in samples)
    return as_hashes([digest(os.fsencode(f"{p.path}\0{p.offset}\0{p.length}\0{p.column}")) for p in pictures])


def _blocks(length: int) -> Iterator[range]:
    return (range(first, min(first + BLOCK_ROWS, length)) for first in range(0, length, BLOCK_ROWS))
