"""Opens the sources that `--data` names, and reads them one after another as samples in a fixed order.

parts   specs.py folders.py hub.py   what a spec stands for: tars, tables, folders
read    shards.py tables.py folders.py
bytes   reading.py cells.py          of a picture, whenever they are needed
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from llm2clip.artifacts import fingerprint
from llm2clip.captions.bad import BadSamples
from llm2clip.captions.config import SourceConfig
from llm2clip.captions.folders import FolderPart, files_in
from llm2clip.captions.hub import hub_parts, is_hub_id
from llm2clip.captions.parts import Part, Reading
from llm2clip.captions.reading import is_url
from llm2clip.captions.sample import Sample
from llm2clip.captions.shards import TarPart
from llm2clip.captions.specs import File, find_files
from llm2clip.captions.tables import TablePart
from llm2clip.errors import SourceError, UsageError

NUM_PARTS_CHECKED = 64
"""Files whose beginnings are looked at before a run; all of ten thousand would take minutes on a network disk."""


def open_source(config: SourceConfig, *, pictures: bool = True) -> Source:
    """The source that `config.data` names; its files are found and their beginnings checked, nothing more is read.

    Args:
        config: the shared flags of every stage.
        pictures: whether pictures are needed. Without, a table needs no picture column, no picture is looked for, and
            a sample's `picture` may be empty: enough for training a teacher.

    Raises:
        UsageError: if nothing is there, a column is missing, or a picture lies outside a table's folder.
        SourceError: if a file cannot be read.

    Example:
        >>> source = open_source(SourceConfig(data=("captions.csv",)))   # doctest: +SKIP
        >>> next(iter(source)).captions                                  # doctest: +SKIP
        {'short': ('a dog',), 'long': ('a brown dog runs over a meadow ...',)}
    """
    if not config.data:
        raise UsageError("no source is given; name one or several, for example --data captions.csv")
    reading = Reading(
        captions=config.captions, image=config.image, allow_outside=config.allow_outside, pictures=pictures
    )
    parts: list[Part] = []
    for spec in config.data:
        if is_hub_id(spec):
            parts += hub_parts(spec, reading, revision=config.revision)
        else:
            parts += [part for file in find_files(spec) for part in _parts_of(file, reading)]
    _refuse_repeated(parts)
    for part in parts[:NUM_PARTS_CHECKED]:
        part.check()
    return Source(parts, reading=reading, max_bad_fraction=config.max_bad_fraction)


def _parts_of(file: File, reading: Reading) -> list[Part]:
    if file.kind == "tar":
        return [TarPart(file, reading)]
    if file.kind != "folder":
        return [TablePart(file, reading)]
    files = [found for path in files_in(Path(file.path)) for found in find_files(str(path))]
    return [part for found in files for part in _parts_of(found, reading)] or [FolderPart(file.path, reading)]


def _refuse_repeated(parts: Sequence[Part]) -> None:
    seen = set()
    for part in parts:
        if part.path in seen:
            raise UsageError(f"--data names {part.path} twice; name it once")
        seen.add(part.path)


class Source:
    """Samples of several parts, one part after another; iterating again gives the same.

    Attributes:
        fingerprint: of the parts' names and sizes and the named columns; the same wherever the files lie.
        bad: what was wrong in the present or last iteration.
        num_parts: files and folders it is made of.
    """

    def __init__(self, parts: Sequence[Part], *, reading: Reading, max_bad_fraction: float) -> None:
        self._parts = list(parts)
        self._names = part_names(parts)
        self.num_parts = len(parts)
        self.bad: BadSamples = _CountedBad(max_bad_fraction)
        sizes = [[name, part.size] for name, part in zip(self._names, parts, strict=True)]
        self.fingerprint = fingerprint([sizes, dict(reading.captions), reading.image])

    def __iter__(self) -> Iterator[Sample]:
        """Every good sample; bad ones are counted in `bad`, which is emptied first.

        Raises:
            TooManyBadSamples: if more than the allowed share are bad, at the end or after a thousand samples.
            SourceError: if there are no samples at all, or a file cannot be read any further.
        """
        self.bad.clear()
        num_good = 0
        for i in range(self.num_parts):
            for sample in self.part(i):
                num_good += 1
                yield sample
        self.bad.check(num_good + self.bad.num_bad)
        if not num_good:
            raise SourceError(f"no usable samples in {', '.join(self._names[:5])}")

    def part(self, number: int) -> Iterator[Sample]:
        """The good samples of one part; bad ones are added to `bad`. For going on where a run stopped.

        A sample's id is its key in the part, with the part's name before it if there are several parts.
        """
        part = self._parts[number]
        prefix = f"{self._names[number]}/" if self.num_parts > 1 else ""
        try:
            for sample in part.samples(self.bad):
                if isinstance(self.bad, _CountedBad):
                    self.bad.num_good += 1
                name = prefix + sample.id
                if not name.isascii():  # a file name that is no UTF-8 shows its odd bytes as \xe9
                    name = name.encode("utf-8", "backslashreplace").decode()
                yield sample if name == sample.id else replace(sample, id=name)
        except OSError as error:
            raise SourceError(f"{part.path} cannot be read: {error}") from None


class _CountedBad(BadSamples):
    """Knows how many were good too, so that a hopeless run stops after a thousand samples, not at its end."""

    def __init__(self, max_fraction: float) -> None:
        super().__init__(max_fraction)
        self.num_good = 0

    def add(self, sample_id: str, cause: str, detail: str = "") -> None:
        super().add(sample_id, cause, detail)
        self.check(self.num_good + self.num_bad, final=False)

    def clear(self) -> None:
        super().clear()
        self.num_good = 0


def part_names(parts: Sequence[Part]) -> list[str]:
    """Each part's path relative to the folder common to all, without its ending where that stays unique.

    Names do not change when the files move together.
    """
    paths = [getattr(part, "name", None) or part.path for part in parts]
    for urls in (True, False):
        group = [path for path in paths if is_url(path) == urls and os.path.isabs(path) != urls]
        root = os.path.commonpath([os.path.dirname(path) for path in group]) if group else ""
        paths = [os.path.relpath(path, root) if path in group else path for path in paths]
    stems = [os.path.splitext(path)[0] for path in paths]
    return stems if len(set(stems)) == len(stems) else paths
