"""Tables as sources: CSV, TSV, JSON, Parquet and Arrow, with picture paths or embedded pictures.

Rows that name the same picture are one sample with the captions of all of them, wherever in the table they stand.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm2clip.captions.bad import BadPicture, BadSamples, logger
from llm2clip.captions.cells import cell_bytes
from llm2clip.captions.columnar import ColumnTable
from llm2clip.captions.columns import Layout, find_layout, read_captions, require
from llm2clip.captions.parts import Reading
from llm2clip.captions.pictures import check_file, check_header
from llm2clip.captions.places import Places
from llm2clip.captions.reading import is_url
from llm2clip.captions.rows import CsvTable, JsonTable
from llm2clip.captions.sample import PictureRef, Sample
from llm2clip.captions.specs import File

NUM_ROWS_CHECKED = 20
Captions = Mapping[str, tuple[str, ...]]


class TablePart:
    """A table of samples.

    Args:
        file: where it lies.
        reading: which columns hold what.
        name: what it is called, if not by its path.
    """

    def __init__(self, file: File, reading: Reading, *, name: str | None = None) -> None:
        self.file, self.reading, self.name = file, reading, name
        self.path, self.size = file.path, file.size
        self._places = Places(file.path, allow_outside=reading.allow_outside)

    def check(self) -> None:
        """Check its columns, and that its first pictures lie where they may."""
        table, layout = self._open()
        if self.reading.pictures and _is_embedded(table, layout.picture) and self.file.kind == "parquet":
            _tell_of_slow_parquet()
        elif self.reading.pictures:
            for name in itertools.islice(_picture_names(table, layout.picture), NUM_ROWS_CHECKED):
                self._places.resolve(name)

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples in the order of the table; of several rows the last counts."""
        table, layout = self._open()
        together = _SamePicture(_picture_names(table, layout.picture))
        for number, row in enumerate(table.rows(layout.columns)):
            if isinstance(row, str):
                bad.add(f"row {number}", "damaged row", f"{self.path}: {row}")
                continue
            value = row.get(layout.picture) if layout.picture else None
            name = value.strip() if isinstance(value, str) else ""
            key = name or str(number)
            captions: Captions | None = read_captions(row, layout, sample_id=key, bad=bad)
            if name and (captions := together.add(name, captions or {})) is None:
                continue
            if sample := self._finish(key, number, value, captions or {}, layout, bad):
                yield sample

    def _open(self) -> tuple[CsvTable | JsonTable | ColumnTable, Layout]:
        table = open_table(self.file)
        images = table.images if isinstance(table, ColumnTable) else []
        named, image = self.reading.captions, self.reading.image
        layout = find_layout(table.columns, captions=named, image=image, images=images)
        require(layout, table.columns, self.path, captions=named, image=image, picture=self.reading.pictures)
        if not self.reading.pictures and _is_embedded(table, layout.picture):
            layout = Layout(None, layout.captions)  # spare the reading of what is not needed
        return table, layout

    def _finish(
        self, key: str, number: int, value: Any, captions: Captions, layout: Layout, bad: BadSamples
    ) -> Sample | None:
        if not captions:
            bad.add(key, "no caption", f"{self.path} row {number}")
            return None
        if not self.reading.pictures:
            return Sample(key, PictureRef(""), captions)
        try:
            return Sample(key, self._picture(number, value, layout.picture or ""), captions)
        except BadPicture as error:
            bad.add(key, error.cause, error.detail)
            return None

    def _picture(self, number: int, value: Any, column: str) -> PictureRef:
        """Where a row's picture lies, after a look at its header; one behind a URL is taken on trust."""
        where = f"{self.path} row {number}, column {column}"
        if name := _name_in(value):
            ref = self._places.resolve(name)
            if not is_url(ref.path):
                check_file(ref.path)
            return ref
        check_header(io.BytesIO(cell_bytes(value, where=where)), where)
        return PictureRef(self.path, offset=number, column=column)


def open_table(file: File) -> CsvTable | JsonTable | ColumnTable:
    """The table in a file.

    Raises:
        SourceError: if it cannot be read.
    """
    if file.kind == "csv":
        return CsvTable(file.path)
    return JsonTable(file.path) if file.kind == "json" else ColumnTable(file.path, file.kind)


@functools.lru_cache
def _tell_of_slow_parquet() -> None:
    logger.info(
        "pictures inside Parquet files are slow to read in random order, a whole row group for each; "
        "for training, tars or a folder saved by datasets are many times faster"
    )


class _SamePicture:
    """Brings together the captions of rows that name the same picture.

    Only the names' hashes are held, and captions of repeated ones between their first and last row.

    Args:
        names: the picture of every row that names one.
    """

    def __init__(self, names: Iterator[str]) -> None:
        hashes, counts = np.unique(np.fromiter(map(hash, names), np.int64), return_counts=True)
        repeated = counts > 1
        self._left = dict(zip(hashes[repeated].tolist(), counts[repeated].tolist(), strict=True))
        self._waiting: dict[str, dict[str, tuple[str, ...]]] = {}

    def add(self, name: str, captions: Captions) -> Captions | None:
        """All captions of the picture if this is its last row, otherwise None."""
        if (key := hash(name)) not in self._left:
            return captions
        merged = self._waiting.setdefault(name, {})
        for kind, texts in captions.items():
            merged[kind] = tuple(dict.fromkeys((*merged.get(kind, ()), *texts)))
        self._left[key] -= 1
        return self._waiting.pop(name) if self._left[key] == 0 else None


def _picture_names(table: CsvTable | JsonTable | ColumnTable, picture: str | None) -> Iterator[str]:
    """The pictures that rows name, one a row; none where the pictures themselves are in the table."""
    if picture is None or _is_embedded(table, picture):
        return
    for row in table.rows([picture]):
        if isinstance(row, dict) and (name := _name_in(row.get(picture))):
            yield name


def _is_embedded(table: CsvTable | JsonTable | ColumnTable, picture: str | None) -> bool:
    return isinstance(table, ColumnTable) and picture in table.embedded


def _name_in(value: Any) -> str | None:
    """The path in a picture cell; None if it holds bytes, or nothing."""
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("path")
    return value.strip() or None if isinstance(value, str) else None
