"""The first pass of a bank: samples and distinct captions from the sources to columns on disk, in flat memory.

Each caption is known by the hash of its text; rows are numbered in the order in which texts first appear. Memory
holds 32 bytes a distinct caption, nothing else that grows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.artifacts import file_digest, write_json
from llm2clip.bank.files import GrowingArray, GrowingTexts, temporary_name
from llm2clip.bank.hashes import HASH_BYTES, HashIndex, as_hashes, digest, text_bytes
from llm2clip.bank.table import FACTS, TABLE, Table, has_table
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import PictureRef, Sample
from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.progress import track

CHUNK_CAPTIONS = 16384
"""Captions gathered before they are looked up and written."""
MAX_KINDS = 256
MAX_KNOWN_PATHS = 65536
"""Picture paths remembered, so that samples of one tar share an entry of the path table."""


@dataclass
class Intake:
    """What a bank is made of.

    Attributes:
        samples: read once, from the first to the last.
        fingerprint: of the sources; the same sources give the same samples.
        bad: filled while `samples` is read.
        base: the table of a bank whose rows come first, with the numbers they have there.
    """

    samples: Iterable[Sample]
    fingerprint: str
    bad: BadSamples
    base: Table | None = None


def collect(intake: Intake, folder: Path) -> dict[str, Any]:
    """Write the table of all samples and captions to `folder/table` and return its facts.

    Raises:
        TooManyBadSamples: if more samples are bad than allowed.
        SourceError: if there is no sample at all.
        UsageError: if there are more than 256 kinds.
    """
    working = temporary_name(folder / TABLE)
    working.mkdir()
    writer = TableWriter(working)
    try:
        if intake.base is not None:
            writer.take_rows(intake.base)
        for sample in track(intake.samples, description="collect", unit="samples"):
            writer.add(sample)
        intake.bad.check(writer.num_samples + intake.bad.num_bad)
        if not writer.num_samples:
            raise SourceError(
                f"no sample with a caption was found; check {setting('data')}, and "
                f"{setting('captions', {'KIND': 'COLUMN'})}"
            )
        facts = {**writer.close(), "source_fingerprint": intake.fingerprint, "bad": intake.bad.to_json()}
        facts["files"] = {path.name: _file_facts(path) for path in sorted(working.glob("*.npy"))}
        write_json(working / FACTS, facts)
        _put(working, folder)
    finally:
        writer.abandon()
        shutil.rmtree(working, ignore_errors=True)
    return facts


def _put(working: Path, folder: Path) -> None:
    """Make `working` the table of `folder`, unless another process was first, as may be where there are no locks."""
    if (folder / TABLE).exists() and not has_table(folder):
        shutil.rmtree(folder / TABLE)  # one that lost a file
    try:
        os.replace(working, folder / TABLE)
    except OSError:  # a folder that holds anything is not replaced
        if not has_table(folder):
            raise


def _file_facts(path: Path) -> dict[str, Any]:
    array = np.load(path, mmap_mode="r")
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": file_digest(path)}


class TableWriter:
    """Appends samples to the columns of a bank's table."""

    def __init__(self, folder: Path) -> None:
        self._pictures = {
            name: GrowingArray(folder / f"picture_{name}.npy", dtype)
            for name, dtype in {"path": np.int32, "offset": np.int64, "length": np.int64, "column": np.uint16}.items()
        }
        self._paths, self._ids = GrowingTexts(folder, "path"), GrowingTexts(folder, "id")
        self._caption_start = GrowingArray(folder / "caption_start.npy", np.int64)
        self._caption_start.append([0])
        self._kind = GrowingArray(folder / "caption_kind.npy", np.uint8)
        self._row = GrowingArray(folder / "caption_row.npy", np.int64)
        self._texts = GrowingTexts(folder, "text")
        self._hashes = GrowingArray(folder / "hash.npy", np.uint8, row_shape=(HASH_BYTES,))
        self._index = HashIndex()
        self._kinds: dict[str, int] = {}
        self._columns: dict[str, int] = {}
        self._known_paths: dict[str, int] = {}
        self._samples_of: dict[str, int] = {}
        self._captions_of: dict[str, int] = {}
        self.num_samples = 0
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._chunk_samples: list[tuple[int, PictureRef, bytes, int]] = []  # path entry, picture, id, captions
        self._chunk_paths: list[bytes] = []
        self._chunk_captions: list[tuple[int, int]] = []  # kind, place in _chunk_texts
        self._chunk_texts: dict[bytes, tuple[int, bytes]] = {}  # hash -> place, text

    def take_rows(self, base: Table) -> None:
        """Begin with the captions of another bank, under their row numbers."""
        for texts, hashes in base.iter_texts():
            self._texts.append(texts)
            self._hashes.append(hashes)
            self._index.insert(hashes, np.arange(self._hashes.length - len(hashes), self._hashes.length))

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        num_captions = 0
        for kind, texts in sample.captions.items():
            code = self._kinds.setdefault(kind, len(self._kinds))
            if code >= MAX_KINDS:
                raise UsageError(
                    f"more than {MAX_KINDS} kinds of caption; the last was {kind!r}: check {setting('captions')}"
                )
            self._samples_of[kind] = self._samples_of.get(kind, 0) + 1
            self._captions_of[kind] = self._captions_of.get(kind, 0) + len(texts)
            for text in texts:
                data = text_bytes(text)
                place, _ = self._chunk_texts.setdefault(digest(data), (len(self._chunk_texts), data))
                self._chunk_captions.append((code, place))
            num_captions += len(texts)
        entry = self._path_entry(sample.picture.path)
        self._chunk_samples.append((entry, sample.picture, text_bytes(sample.id), num_captions))
        self.num_samples += 1
        if len(self._chunk_captions) >= CHUNK_CAPTIONS:
            self._flush()

    def _path_entry(self, path: str) -> int:
        entry = self._known_paths.get(path)
        if entry is None:
            if len(self._known_paths) >= MAX_KNOWN_PATHS:
                self._known_paths.clear()
            entry = self._known_paths[path] = self._paths.length + len(self._chunk_paths)
            self._chunk_paths.append(os.fsencode(path))
        return entry

    def _flush(self) -> None:
        if not self._chunk_samples:
            return
        entries, pictures, ids, counts = zip(*self._chunk_samples, strict=True)
        self._paths.append(self._chunk_paths)
        self._pictures["path"].append(list(entries))
        self._pictures["offset"].append([picture.offset for picture in pictures])
        self._pictures["length"].append([picture.length for picture in pictures])
        columns = [self._columns.setdefault(picture.column, len(self._columns)) for picture in pictures]
        self._pictures["column"].append(columns)
        self._ids.append(list(ids))
        self._caption_start.append(self._row.length + np.cumsum(counts, dtype=np.int64))
        kinds, places = zip(*self._chunk_captions, strict=True)
        self._kind.append(list(kinds))
        self._row.append(self._rows_of_chunk()[list(places)])
        self._start_chunk()

    def _rows_of_chunk(self) -> Any:
        """The row of each text of the chunk; texts met for the first time are written and get the next rows."""
        hashes = as_hashes(list(self._chunk_texts))
        rows = self._index.lookup(hashes)
        new = np.flatnonzero(rows < 0)
        rows[new] = np.arange(self._hashes.length, self._hashes.length + len(new))
        texts = [text for _, text in self._chunk_texts.values()]
        self._texts.append([texts[i] for i in new])
        self._hashes.append(hashes[new])
        self._index.insert(hashes[new], rows[new])
        return rows

    def close(self) -> dict[str, Any]:
        """Finish all files; returns the counts and the names of kinds and columns, by code."""
        self._flush()
        for array in self._arrays():
            array.close()
        return {
            "num_samples": self.num_samples,
            "num_captions": self._row.length,
            "num_rows": self._hashes.length,
            "kinds": {k: {"samples": self._samples_of[k], "captions": self._captions_of[k]} for k in self._kinds},
            "columns": list(self._columns),
        }

    def abandon(self) -> None:
        """Close all files, however far they are."""
        for array in self._arrays():
            array.abandon()

    def _arrays(self) -> list[GrowingArray]:
        texts = (*self._paths.arrays, *self._ids.arrays, *self._texts.arrays)
        return [*self._pictures.values(), self._caption_start, self._kind, self._row, self._hashes, *texts]
