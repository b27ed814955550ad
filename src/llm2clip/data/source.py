"""Opens the sources that `--data` names, and reads them one after another as samples in a fixed order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm2clip.artifacts import fingerprint
from llm2clip.data.bad import BadSamples, logger
from llm2clip.data.config import SourceConfig
from llm2clip.data.files import FolderPart, files_in, split_folder
from llm2clip.data.remote_tars import tar_part
from llm2clip.data.rows import TABLES
from llm2clip.data.sample import Part, Reading, Sample
from llm2clip.data.spec import File, find_files, local_file
from llm2clip.data.tables import OUTSIDE, TablePart
from llm2clip.data.urls import is_url, suffix
from llm2clip.data.views import add_views, views_of
from llm2clip.errors import SourceError, UsageError
from llm2clip.errors import setting as written

READERS: dict[str, Callable[[File, Reading], Part]] = {"tar": tar_part, **dict.fromkeys(TABLES, TablePart)}
"""File name ending -> what reads such files; a further format is a row here, or in `rows.TABLES`."""
COMPRESSED = ("gz", "tgz", "bz2", "xz", "zst", "zip", "7z", "rar")
NUM_PARTS_CHECKED = 64
"""Files whose beginnings are looked at before a run; all of ten thousand would take minutes on a network disk."""


def open_source(config: SourceConfig, *, images: bool = True, setting: str = "data") -> Source:
    r"""The source that `config.data` names; its files are found and their beginnings checked, nothing more is read.

    Args:
        config: the shared flags of every stage.
        images: whether images are needed. Without, a table needs no image column, no image is looked for, and
            a sample's `image` may be empty: enough for training a teacher.
        setting: the name of the setting that the user gave as `config.data`, for errors.

    Raises:
        UsageError: if nothing is there, a column is missing, or all images lie outside their table's folder.
        SourceError: if a file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "captions.csv").write_text("image,short_caption\ndog.jpg,a dog\n")
        ...     next(iter(open_source(SourceConfig(data=(f"{folder}/captions.csv",)), images=False))).captions
        {'short': ('a dog',)}
    """
    word = written(setting)
    if not config.data:
        raise UsageError(f"no source is given; name one or several, for example {written(setting, ('captions.csv',))}")
    reading = Reading(
        captions=config.captions,
        image=config.image,
        image_root=config.image_root,
        allow_outside=config.allow_outside,
        split=config.split,
        text_lines=config.text_lines,
        images=images,
        word=word,
    )
    root = config.image_root
    if root is not None and not (is_url(root) or os.path.isdir(root)):
        raise UsageError(f"{written('image_root')} {root} is no folder; give the one that the images' paths start from")
    options: dict[str, Any] = {"word": word, "revision": config.revision, "split": config.split}
    files = [file for spec in config.data for file in find_files(spec, **options)]
    parts = [part for file in files for part in _parts_of(file, reading)]
    seen = set()
    for part in parts:
        if part.path in seen:
            raise UsageError(f"{word} names {part.path} twice; name it once")
        seen.add(part.path)
    told: dict[str, list[str]] = {}
    for part in parts[:NUM_PARTS_CHECKED]:
        with _naming(part):
            told.setdefault(part.check(), []).append(part.path)
    for what, paths in told.items():
        if what:
            _tell(f"{paths[0]}{f' and {len(paths) - 1} like it' if len(paths) > 1 else ''}: {what}")
    _look_for_images(parts, reading, fails=config.max_bad_fraction < 1)
    return Source(parts, reading=reading, max_bad_fraction=config.max_bad_fraction, views=config.views)


def _look_for_images(parts: Sequence[Part], reading: Reading, *, fails: bool) -> None:
    """Warn of tables of whose first images most are not there.

    Raises:
        UsageError: if images are needed and not one of all is there.
    """
    found = []
    for part in parts[:NUM_PARTS_CHECKED]:
        with _naming(part):
            found.append(part.missing() if isinstance(part, TablePart) else None)
    if reading.images and fails and len(found) == len(parts) and all(missing and missing.all for missing in found):
        raise UsageError(str(found[0]))
    for missing in filter(None, found):
        later = "" if reading.images else " (not needed for captions alone, as here, but a bank will need them)"
        _tell(f"{missing}{later}", logging.WARNING)


@functools.cache
def _tell(line: str, level: int = logging.INFO) -> None:
    """Log a line once."""
    logger.log(level, "%s", line)


def look_at_sources(config: SourceConfig) -> None:
    """Look at the beginning of the tables and tars on this machine, nothing heavy imported: a mistake is told at once.

    Raises:
        UsageError: for a path or column that is not there.
        SourceError: if a file cannot be read.
    """
    local = [spec for spec in config.data if not is_url(spec) and not spec.startswith("hf:")]
    files = [file for spec in local for file in find_files(spec)]
    tables = tuple(file.path for file in files if file.kind != "folder")[:NUM_PARTS_CHECKED]
    if tables:
        names = [field.name for field in dataclasses.fields(SourceConfig)]
        own = {name: getattr(config, name) for name in names}
        open_source(SourceConfig(**{**own, "data": tables}), images=config.needs_images)


def _parts_of(file: File, reading: Reading) -> list[Part]:
    if file.label:  # a split of the Hub's is chosen
        reading = replace(reading, split=None)
    if file.kind == "folder":
        if (inner := split_folder(file.path, word=reading.word, split=reading.split)) is not None:
            return _parts_of(local_file(inner, word=reading.word), replace(reading, split=None))
        inside = [local_file(path, word=reading.word) for path in files_in(file.path, word=reading.word)]
        if inside:
            return [part for found in inside for part in _parts_of(found, reading)]
    if reading.split is not None and file.kind in ("folder", "tar"):
        what = "is read whole" if file.kind == "tar" else "holds no splits"
        raise UsageError(f"{reading.word} {file.path} {what}; leave {written('split', reading.split)} out")
    if file.kind == "folder":
        return [FolderPart(file.path, reading)]
    if file.kind in READERS:
        return [READERS[file.kind](file, reading)]
    what = f"{reading.word} {file.path}"
    if file.kind in COMPRESSED:
        raise UsageError(f"{what} is compressed; unpack it first, images are read by random access")
    other = "URL/*.tar" if is_url(file.path) else "a folder, hf:org/name"
    known = ", ".join([other, *(f".{kind}" for kind in READERS)])
    raise UsageError(f"{what}: unknown ending {suffix(file.path)!r}; give {known}")


@contextlib.contextmanager
def _naming(part: Part) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(f"{part.path} cannot be read: {error.strerror or error}") from None


class Source:
    """Samples of several parts, one part after another; iterating again gives the same.

    Its `fingerprint` is of the parts' names and sizes, the named columns and the views, the same wherever the files
    lie; `bad` is what was wrong in the present or last iteration.
    """

    def __init__(
        self, parts: Sequence[Part], *, reading: Reading, max_bad_fraction: float, views: Mapping[str, str]
    ) -> None:
        self._parts, self.num_parts = list(parts), len(parts)
        self._views, self._lacking = dict(views), {made: kind for kind, _, made in views_of(views)}
        self._names = part_names([part.name for part in parts])
        self.bad = _CountedBad(max_bad_fraction)
        sizes = [[name, part.size] for name, part in zip(self._names, parts, strict=True)]
        unusual = [
            value for value in (reading.split, reading.text_lines, self._views) if value not in (None, "auto", {})
        ]
        self.fingerprint = fingerprint([sizes, dict(reading.captions), reading.image, *unusual])

    def __iter__(self) -> Iterator[Sample]:
        """Every good sample; bad ones are counted in `bad`, which is emptied first.

        Raises:
            TooManyBadSamples: if more than the allowed share are bad, at the end or after a thousand samples.
            SourceError: if there are no samples at all, or a file cannot be read any further.
        """
        self.bad.clear()
        for i in range(self.num_parts):
            yield from self.part(i)
        if not self.bad.num_good and 0 < self.bad.num_bad == self.bad.counts.get(OUTSIDE, 0):
            raise UsageError(self.bad.examples[OUTSIDE][0])
        self.bad.check(self.bad.num_good + self.bad.num_bad)
        if not self.bad.num_good:
            raise SourceError(f"no usable samples in {', '.join(self._names[:5])}")
        for made, kind in self._lacking.items():
            logger.warning(
                "%s: there is no %s, as no caption of the kind %s has sentences enough", written("views"), made, kind
            )

    def part(self, number: int) -> Iterator[Sample]:
        """The good samples of one part; bad ones are added to `bad`. For going on where a run stopped.

        A sample's id is its key in the part, with the part's name before it if there are several parts.
        """
        part = self._parts[number]
        prefix = f"{self._names[number]}/" if self.num_parts > 1 else ""
        with _naming(part):
            for sample in part.samples(self.bad):
                self.bad.num_good += 1
                if self._views:
                    sample = replace(sample, captions=add_views(sample.captions, self._views))
                    self._lacking = {made: kind for made, kind in self._lacking.items() if made not in sample.captions}
                name = prefix + sample.id
                if not name.isascii():  # a file name that is no UTF-8 shows its odd bytes as \xe9
                    name = name.encode("utf-8", "backslashreplace").decode()
                yield sample if name == sample.id else replace(sample, id=name)


class _CountedBad(BadSamples):
    """Knows how many were good too, so that a hopeless run stops after a thousand samples, not at its end."""

    num_good = 0

    def add(self, sample_id: str, cause: str, detail: str = "") -> None:
        super().add(sample_id, cause, detail)
        self.check(self.num_good + self.num_bad, final=False)

    def clear(self) -> None:
        super().clear()
        self.num_good = 0


def part_names(paths: list[str]) -> list[str]:
    """Each path relative to the folder common to all, so that all may move; without ending where that stays unique."""
    for urls in (True, False):
        group = {path for path in paths if is_url(path) == urls and os.path.isabs(path) != urls}
        root = os.path.commonpath([os.path.dirname(path) for path in group]) if group else ""
        paths = [os.path.relpath(path, root) if path in group else path for path in paths]
    stems = [os.path.splitext(path)[0] for path in paths]
    return stems if len(set(stems)) == len(stems) else paths
