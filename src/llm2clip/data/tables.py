"""A table as a source of samples.

Rows with the same image are one sample with the captions of all of them, wherever in the table they stand.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llm2clip.data.bad import EARLY_SAMPLES, BadImage, BadSamples, logger
from llm2clip.data.bytes import cell_bytes
from llm2clip.data.columns import Layout, find_layout, image_columns, name_in, read_captions, require
from llm2clip.data.files import IMAGE_ENDINGS
from llm2clip.data.images import check_file, check_header
from llm2clip.data.rows import TABLES, BadRow, Table
from llm2clip.data.sample import ImageRef, Reading, Sample
from llm2clip.data.spec import File
from llm2clip.data.urls import is_url, suffix
from llm2clip.data.where import Missing
from llm2clip.errors import UsageError, setting, shown

NUM_ROWS_LOOKED_AT = 20
"""Rows whose cells tell a column of images from one of their folders."""
OUTSIDE = "outside the table's folder"
SPLIT_COLUMN, MAX_SPLITS = "split", 20
"""A column of this name with fewer values says what is for training and what for testing."""
BASE64 = ("data:image/", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")
"""How images begin that stand in a table as text: a data URL; JPEG, PNG, GIF, WebP and BMP in base64."""
MAX_NAME = 4096
"""Longer names no file system has."""
Captions = Mapping[str, tuple[str, ...]]


class Places:
    """Where the images that a table names lie: inside the table's own folder, unless it is allowed otherwise.

    Args:
        root: what relative names are relative to, and where images may lie, too; by default the table's folder.
        also: another folder where images may lie.

    >>> Places("/data/captions.csv", allow_outside=False).resolve("a/1.jpg").path
    '/data/a/1.jpg'
    >>> Places("/data/captions.csv", allow_outside=False, root="/images").resolve("a/1.jpg").path
    '/images/a/1.jpg'
    """

    def __init__(self, table: str, *, allow_outside: bool, root: str | None = None, also: str = "") -> None:
        self.table, self.allow_outside = table, allow_outside
        own = posixpath.dirname(table)
        self.folder = own if root is None else root.rstrip("/") if is_url(root) else os.path.abspath(root)
        if not is_url(self.folder):
            # the Hub cache keeps files as links to blobs: beside the table's target lie its images' targets
            beside = set() if is_url(table) else {os.path.realpath(own), os.path.dirname(os.path.realpath(table))}
            self._roots = {os.path.realpath(self.folder), *beside, *([os.path.realpath(also)] if also else [])}
            self._real_folder = functools.lru_cache(maxsize=4096)(os.path.realpath)

    def resolve(self, name: str) -> ImageRef:
        """Where the image called `name` in the table lies; BadImage if outside, by name or through a link."""
        path = self.join(name)
        if len(name) > MAX_NAME or (len(name) > 64 and name.startswith(BASE64)):
            raise BadImage(
                "image as text",
                f"{self.table}: in the place of a path stand {len(name):,} characters {shown(name, most=24)}, "
                "base64 as it seems; write the images to files, or as bytes into Parquet",
            )
        if not (self.allow_outside or self._is_inside(path)):
            raise BadImage(
                OUTSIDE,
                f"{self.table}: image {shown(name)} lies {OUTSIDE}; move it or add {setting('allow_outside', True)}",
            )
        return ImageRef(path)

    def join(self, name: str) -> str:
        """The path or URL that `name` in the table stands for, the same however it is spelt."""
        if is_url(name):
            return name
        if is_url(self.folder):
            scheme, _, rest = self.folder.rpartition("://")
            return f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"
        return os.path.normpath(os.path.join(self.folder, name))

    def _is_inside(self, path: str) -> bool:
        if is_url(self.folder):
            return path.startswith(self.folder + "/") and "/../" not in path
        if is_url(path) or "\0" in path:  # no file has such a name: it will be reported as missing
            return not is_url(path)
        real = os.path.realpath(path) if os.path.islink(path) else self._real_folder(os.path.dirname(path)) + "/"
        return any(real.startswith(root.rstrip("/") + "/") for root in self._roots)


class TablePart:
    """A table of samples."""

    def __init__(self, file: File, reading: Reading) -> None:
        self.path, self.size, self.reading = file.path, file.size, reading
        self.name = file.label or file.path
        self._places = Places(file.path, allow_outside=reading.allow_outside, root=reading.image_root, also=file.also)

    def check(self) -> str:
        """Check its columns, and that not all of its images lie outside its folder."""
        table, layout = self._open()
        told = layout.told([column for column in table.columns if column != SPLIT_COLUMN])
        if not self.reading.images:
            return told
        if layout.image in table.embedded:
            if suffix(self.path) == ".parquet":
                _tell_of_slow_parquet()
            return told
        first = ""
        for _, row in self._rows(table, layout):
            try:
                if isinstance(row, dict) and (name := layout.name_in(row)):
                    self._places.resolve(name)
                    return told
            except BadImage as error:
                first = first or error.detail
        if first:
            raise UsageError(first)
        return told

    def missing(self) -> Missing | None:
        """The first images that are not there, if most of those looked for are not.

        Of the first 20 it is enough that one is there; only where none is, up to 1,000 are looked for.
        """
        table, layout = self._open()
        if layout.image is None or layout.image in table.embedded:
            return None
        names, looked, example = [], 0, ""
        for _, row in self._rows(table, layout):
            name = "" if isinstance(row, BadRow) else layout.name_in(row)
            with contextlib.suppress(BadImage):  # which is another fault
                if not name or is_url(path := self._places.resolve(name).path):
                    continue
                looked += 1
                if not os.path.isfile(path):
                    names.append(name)
                    example = example or path
            if looked >= (EARLY_SAMPLES if len(names) == looked else NUM_ROWS_LOOKED_AT):
                break
        return Missing(self.path, tuple(names), looked, example) if 2 * len(names) > looked else None

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples in the order of the table; of several rows the last counts."""
        table, layout = self._open()
        images = (self._image_in(row, layout) for _, row in self._rows(table, layout))
        together = _SameImage(filter(None, images))
        splits: Counter[str] = Counter()
        for number, row in self._rows(table, layout, splits):
            if isinstance(row, BadRow):
                bad.add(f"row {number}", "damaged row", f"{self.path}: {row.detail}")
                continue
            name = layout.name_in(row)
            key = (name if is_url(name) else posixpath.normpath(name)) if name else str(number)
            captions: Captions | None = read_captions(row, layout, sample_id=key, bad=bad)
            if (image := self._image_in(row, layout)) and (captions := together.add(image, captions or {})) is None:
                continue
            if not captions:
                bad.add(key, "no caption", f"{self.path} row {number}")
                continue
            try:
                yield Sample(key, self._image(number, row, layout), captions)
            except BadImage as error:
                bad.add(key, error.cause, error.detail)
        self._tell_of_splits(splits)

    def _open(self) -> tuple[Table, Layout]:
        table = TABLES[suffix(self.path)[1:]](self.path)
        named, image = self.reading.captions, self.reading.image
        layout = find_layout(table.columns, captions=named, image=image, images=table.images)
        require(layout, table.columns, self.path, captions=named, image=image, needs_image=self.reading.images)
        if self.reading.split is not None and SPLIT_COLUMN not in table.columns:
            raise UsageError(
                f"{self.path} has no column {SPLIT_COLUMN!r} ({setting('split', self.reading.split)}); its columns are "
                f"{', '.join(table.columns[:20])}"
            )
        if layout.image in table.embedded:
            # without images, spare the reading of what is not needed
            return table, layout if self.reading.images else replace(layout, image=None)
        return table, self._with_folder(table, layout)

    def _with_folder(self, table: Table, layout: Layout) -> Layout:
        """The layout with the column that does hold image files, and that of their folder if they lie in it."""
        candidates = [] if self.reading.image else image_columns(table.columns)
        if len(candidates) < 2:
            return layout
        rows = [row for row in itertools.islice(table.rows(candidates), NUM_ROWS_LOOKED_AT) if isinstance(row, dict)]
        files = next((c for c in candidates if any(_is_image_name(row.get(c)) for row in rows)), None)
        if files is None:
            return layout
        folders = [None, *(column for column in candidates if column != files)]
        choices = [replace(layout, image=files, folder=folder) for folder in folders]
        there = (choice for choice in choices if any(self._is_there(choice.name_in(row)) for row in rows))
        likely = replace(layout, image=files, folder=None if files == layout.image else layout.image)
        return next(there, likely)

    def _is_there(self, name: str) -> bool:
        return bool(name) and not is_url(self.path) and os.path.isfile(self._places.join(name))

    def _rows(
        self, table: Table, layout: Layout, splits: Counter[str] | None = None
    ) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """The rows of the split that is asked for, by their number; `splits` counts those of each where none is."""
        has_split = SPLIT_COLUMN in table.columns
        wanted = [*layout.columns, *([SPLIT_COLUMN] if has_split else [])]
        for number, row in enumerate(table.rows(wanted)):
            if has_split and isinstance(row, dict):
                split = str(row.get(SPLIT_COLUMN)).strip()
                if self.reading.split not in (None, split):
                    continue
                if splits is not None:
                    splits[split] += 1
            yield number, row

    def _tell_of_splits(self, splits: Counter[str]) -> None:
        """Say that rows of several splits were read, or that there are none of the one asked for."""
        if self.reading.split is None and 1 < len(splits) < MAX_SPLITS:
            listed = ", ".join(f"{count:,} {name}" for name, count in splits.most_common())
            logger.info("%s: all rows were read, %s; %s takes one split", self.path, listed, setting("split", "NAME"))
        elif self.reading.split is not None and not splits:  # other files of the source may have some
            logger.info("%s has no rows whose %s is %r", self.path, SPLIT_COLUMN, self.reading.split)

    def _image_in(self, row: dict[str, Any] | BadRow, layout: Layout) -> str | bytes:
        """What is equal for rows of one image: its place, or a digest of its bytes; empty if there is none."""
        if isinstance(row, BadRow) or layout.image is None:
            return ""
        if name := layout.name_in(row):
            return self._places.join(name)
        cell = row.get(layout.image)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        return hashlib.blake2b(data, digest_size=16).digest() if isinstance(data, bytes) and data else ""

    def _image(self, number: int, row: dict[str, Any], layout: Layout) -> ImageRef:
        """Where a row's image lies, after a look at its header; one behind a URL is taken on trust."""
        if not self.reading.images or layout.image is None:
            return ImageRef("")
        if name := layout.name_in(row):
            ref = self._places.resolve(name)
            if not is_url(ref.path):
                check_file(ref.path)
            return ref
        where = f"{self.path} row {number}, column {layout.image}"
        check_header(io.BytesIO(cell_bytes(row.get(layout.image), where=where)), where)
        return ImageRef(self.path, offset=number, column=layout.image)


def _is_image_name(value: Any) -> bool:
    return suffix(name_in(value))[1:].lower() in IMAGE_ENDINGS


@functools.lru_cache
def _tell_of_slow_parquet() -> None:
    logger.info(
        "images inside Parquet files are slow to read in random order, a whole row group for each; "
        "for training, tars or a folder saved by datasets are many times faster"
    )


class _SameImage:
    """Brings together the captions of rows with the same image; told before of the `images` in all rows.

    Only their hashes are held, and captions of repeated ones between their first and last row.
    """

    def __init__(self, images: Iterator[str | bytes]) -> None:
        first = list(itertools.islice(images, 1))
        hashes, counts = np.unique(np.fromiter(map(hash, itertools.chain(first, images)), np.int64), return_counts=True)
        repeated = counts > 1
        if len(counts) == 1 and isinstance(first[0], bytes):
            repeated[:] = False  # one image in all rows stands in for those that a table of captions does not have
        self._left = dict(zip(hashes[repeated].tolist(), counts[repeated].tolist(), strict=True))
        self._waiting: dict[str | bytes, dict[str, tuple[str, ...]]] = {}

    def add(self, image: str | bytes, captions: Captions) -> Captions | None:
        """All captions of the image if this is its last row, otherwise None."""
        if (key := hash(image)) not in self._left:
            return captions
        merged = self._waiting.setdefault(image, {})
        for kind, texts in captions.items():
            merged[kind] = tuple(dict.fromkeys((*merged.get(kind, ()), *texts)))
        self._left[key] -= 1
        return self._waiting.pop(image) if self._left[key] == 0 else None
