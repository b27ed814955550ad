"""The first pass of a bank: samples and distinct captions from the sources to a table on disk, in flat memory.

Each caption is known by the hash of its text; rows are numbered in the order in which texts first appear. Memory
holds 32 bytes a distinct caption, nothing else that grows.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, DTypeLike

from llm2clip.artifacts import file_digest, to_disk, write_json
from llm2clip.bank.hashes import HASH_BYTES, HashIndex, as_hashes, digest, text_bytes
from llm2clip.bank.reader import FACTS, SCHEMAS, TABLE, Table
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.progress import track

CHUNK_CAPTIONS = 16384
"""Captions gathered before they are looked up and written."""
MAX_KINDS = 256
NUMBERS = {
    "path": "int32",
    "offset": "int64",
    "length": "int64",
    "column": "uint16",
    "start": "int64",
    "kind": "uint8",
    "row": "int64",
    "hash": "uint8",
}
"""Columns of numbers: of each sample the entry in the table of paths and the other facts of its image's place, and
where its captions start; of each caption kind and row; of each row the hash."""
MAX_KNOWN_PATHS = 65536
"""Image paths remembered, so that samples of one tar share an entry of the path table."""


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
    working = folder / f".{TABLE}.tmp"
    shutil.rmtree(working, ignore_errors=True)  # of a killed run
    working.mkdir()
    try:
        with contextlib.ExitStack() as files:
            writer = TableWriter(working, files)
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
        facts["files"] = {path.name: {"sha256": file_digest(path)} for path in sorted(working.glob("*.arrow"))}
        write_json(working / FACTS, facts)
        shutil.rmtree(folder / TABLE, ignore_errors=True)  # one that lost a file
        os.replace(working, folder / TABLE)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return facts


class Column:
    """Numbers appended to a nameless file in `folder`, and in the end mapped from it as one Arrow array."""

    def __init__(self, folder: Path, dtype: DTypeLike, files: contextlib.ExitStack) -> None:
        self.dtype, self.length = dtype, 0
        self._file = files.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 (the stack closes it)

    def append(self, rows: ArrayLike) -> None:
        """Append rows."""
        array = np.asarray(rows, self.dtype)
        self._file.write(array.tobytes())
        self.length += len(array)

    def buffer(self) -> pa.Buffer:
        """All rows so far."""
        self._file.flush()
        if not self.length:
            return pa.py_buffer(b"")  # nothing cannot be mapped
        return pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))

    def array(self, type: pa.DataType | None = None) -> pa.Array:
        """All rows so far, by default as the numbers they are."""
        return pa.Array.from_buffers(type or pa.from_numpy_dtype(self.dtype), self.length, [None, self.buffer()])


class TextColumn:
    """Texts appended as one blob of bytes and where each ends, as Arrow keeps them."""

    def __init__(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._bytes, self._ends = Column(folder, np.uint8, files), Column(folder, np.int64, files)
        self._ends.append([0])

    @property
    def length(self) -> int:
        """Texts so far."""
        return self._ends.length - 1

    def append(self, texts: list[bytes]) -> None:
        """Append encoded texts."""
        self._ends.append(self._bytes.length + np.cumsum([len(text) for text in texts], dtype=np.int64))
        self._bytes.append(np.frombuffer(b"".join(texts), np.uint8))

    def array(self, type: pa.DataType) -> pa.Array:
        """All texts so far."""
        return pa.Array.from_buffers(type, self.length, [None, self._ends.buffer(), self._bytes.buffer()])


class TableWriter:
    """Appends samples to a bank's table.

    Args:
        files: closes what is open.
    """

    def __init__(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._folder = folder
        self._numbers = {name: Column(folder, dtype, files) for name, dtype in NUMBERS.items()}
        self._paths, self._ids, self._texts = (TextColumn(folder, files) for _ in range(3))
        self._numbers["start"].append([0])
        self._index = HashIndex()
        self._kinds: dict[str, int] = {}
        self._columns: dict[str, int] = {}
        self._known_paths: dict[str, int] = {}
        self._samples_of: dict[str, int] = {}
        self._captions_of: dict[str, int] = {}
        self.num_samples = 0
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._chunk_samples: list[tuple[int, ImageRef, bytes, int]] = []  # path entry, image, id, captions
        self._chunk_paths: list[bytes] = []
        self._chunk_captions: list[tuple[int, int]] = []  # kind, place in _chunk_texts
        self._chunk_texts: dict[bytes, tuple[int, bytes]] = {}  # hash -> place, text

    def take_rows(self, base: Table) -> None:
        """Begin with the captions of another bank, under their row numbers."""
        for texts, hashes in base.iter_texts():
            first = self._texts.length
            self._texts.append(texts)
            self._numbers["hash"].append(hashes)
            self._index.insert(hashes, np.arange(first, self._texts.length))

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
        entry = self._path_entry(sample.image.path)
        self._chunk_samples.append((entry, sample.image, text_bytes(sample.id), num_captions))
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
        entries, images, ids, counts = zip(*self._chunk_samples, strict=True)
        self._paths.append(self._chunk_paths)
        self._numbers["path"].append(entries)
        self._numbers["offset"].append([image.offset for image in images])
        self._numbers["length"].append([image.length for image in images])
        self._numbers["column"].append([self._columns.setdefault(image.column, len(self._columns)) for image in images])
        self._ids.append(list(ids))
        self._numbers["start"].append(self._numbers["row"].length + np.cumsum(counts, dtype=np.int64))
        kinds, places = zip(*self._chunk_captions, strict=True)
        self._numbers["kind"].append(kinds)
        self._numbers["row"].append(self._rows_of_chunk()[list(places)])
        self._start_chunk()

    def _rows_of_chunk(self) -> Any:
        """The row of each text of the chunk; texts met for the first time are written and get the next rows."""
        hashes = as_hashes(list(self._chunk_texts))
        rows = self._index.lookup(hashes)
        new = np.flatnonzero(rows < 0)
        rows[new] = np.arange(self._texts.length, self._texts.length + len(new))
        texts = [text for _, text in self._chunk_texts.values()]
        self._texts.append([texts[i] for i in new])
        self._numbers["hash"].append(hashes[new])
        self._index.insert(hashes[new], rows[new])
        return rows

    def close(self) -> dict[str, Any]:
        """Write the table; returns the counts and the names of kinds and columns, by code."""
        self._flush()
        numbers = self._numbers
        kinds = coded(numbers["kind"], self._kinds)
        captions = pa.StructArray.from_arrays([kinds, numbers["row"].array()], ["kind", "row"])
        samples = (
            self._ids.array(pa.large_string()),
            pa.DictionaryArray.from_arrays(numbers["path"].array(), self._paths.array(pa.large_binary())),
            numbers["offset"].array(),
            numbers["length"].array(),
            coded(numbers["column"], self._columns),
            pa.LargeListArray.from_arrays(numbers["start"].array(), captions),
        )
        texts = self._texts.array(pa.large_string()), numbers["hash"].array(pa.binary(HASH_BYTES))
        for (name, schema), columns in zip(SCHEMAS.items(), (samples, texts), strict=True):
            path = self._folder / f"{name}.arrow"
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(pa.record_batch(list(columns), schema=schema))
            to_disk(path)
        return {
            "num_samples": self.num_samples,
            "num_captions": self._numbers["row"].length,
            "num_rows": self._texts.length,
            "kinds": {k: {"samples": self._samples_of[k], "captions": self._captions_of[k]} for k in self._kinds},
            "columns": list(self._columns),
        }


def coded(codes: Column, names: Iterable[str]) -> pa.Array:
    """The codes of names as an array of these names."""
    return pa.DictionaryArray.from_arrays(codes.array(), pa.array([text_bytes(name) for name in names], pa.string()))
