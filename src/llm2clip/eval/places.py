"""The folder of a benchmark: its files and images found as they were distributed, loose or inside a zip or tar."""

from __future__ import annotations

import functools
import logging
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from llm2clip.data.sample import ImageRef
from llm2clip.data.tars import Tar, TarDamage
from llm2clip.errors import SourceError, UsageError, setting

logger = logging.getLogger("llm2clip")
PACKED = (".tgz", ".tar.gz", ".7z", ".rar")
"""Archives whose members cannot be read one by one."""


class Text(NamedTuple):
    """A text file, and what it is called in messages."""

    name: str
    content: str

    def lines(self) -> list[str]:
        r"""Its lines, whatever ends them, without an empty last one.

        >>> Text("a.txt", "one\r\ntwo\u2028 still two\r\n").lines()
        ['one', 'two\u2028 still two']
        """
        lines = self.content.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # splitlines knows too many ends
        return lines[:-1] if not lines[-1] else lines


class Place:
    """A benchmark's folder.

    Args:
        root: the folder itself, or the one that holds it under the benchmark's name.
        name: of the benchmark, also for messages.
        fetch: what must lie there, for messages.
        variant_of: another benchmark, whose folder below the root will do where there is none of this name.

    Raises:
        UsageError: if there is no such folder.
    """

    def __init__(self, root: str | Path, name: str, fetch: Sequence[str], *, variant_of: str = "") -> None:
        below = (Path(root) / each for each in (name, variant_of) if each)
        self.name, self._fetch = name, fetch
        self.folder = next((folder for folder in below if folder.is_dir()), Path(root))
        self.notes: list[str] = []
        if not self.folder.is_dir():
            raise UsageError(f"{setting('root')} {root} is no folder")

    def note(self, line: str) -> None:
        """Say what was noticed while reading, in the log and in the report."""
        self.notes.append(line)
        logger.warning("%s: %s", self.name, line)

    def paths(self, *patterns: str) -> list[Path]:
        """The files that match the first pattern that any matches, in the order of their names."""
        found = (sorted(self.folder.glob(pattern)) for pattern in patterns)
        return next(filter(None, found), [])

    def text(self, *names: str) -> Text | None:
        """The first of these files that is there: below the folder, or at the end of a path in one of its zips."""
        for name in names:
            if (path := self.folder / name).is_file():
                return Text(name, _decoded(path.read_bytes(), str(path)))
        for name in names:
            for archive in self.paths("*.zip"):
                member = next((m for m in _members(archive) if f"/{m}".endswith(f"/{name}")), None)
                if member is not None:
                    where = f"{archive.name}: {member}"
                    return Text(where, _decoded(_zip(archive).read(member), where))
        return None

    def texts(self, folder: str) -> dict[str, Text]:
        """The .txt files of a folder by their names without ending: below the place, or in one of its zips."""
        if found := self.paths(f"{folder}/*.txt", f"*/{folder}/*.txt"):
            return {p.stem: Text(str(p.relative_to(self.folder)), _decoded(p.read_bytes(), str(p))) for p in found}
        for archive in self.paths("*.zip"):
            members = [m for m in _members(archive) if PurePosixPath(m).parent.name == folder and m.endswith(".txt")]
            if members:
                zipped = _zip(archive)
                return {
                    PurePosixPath(m).stem: Text(f"{archive.name}: {m}", _decoded(zipped.read(m), m)) for m in members
                }
        return {}

    def absent(self, what: str = "") -> UsageError:
        """The error that nothing of it is there, with what to fetch."""
        wanted = "; ".join(self._fetch)
        return UsageError(f"{self.name}: {self.folder} lacks {what or 'its files'}; it takes {wanted}")


class Images:
    """Where the images of a benchmark lie: loose, in a zip or in a tar.

    Args:
        place: the benchmark's folder.
        folders: below it, in which images are looked for, too.
    """

    def __init__(self, place: Place, folders: Sequence[str]) -> None:
        self._place = place
        self._there = [str(folder.resolve()) for name in ("", *folders) if (folder := place.folder / name).is_dir()]

    def find(self, name: str) -> ImageRef | None:
        """An image by its name in the annotations, with or without a folder before it; None if it is not there.

        Raises:
            SourceError: if several in an archive could be meant.
        """
        last = name.rpartition("/")[2]
        for folder in self._there:
            for path in dict.fromkeys((f"{folder}/{name}", f"{folder}/{last}")):
                if os.path.isfile(path):
                    return ImageRef(path)
        choices = self._packed.get(last, [])
        exact = [ref for path, ref in choices if f"/{path}".endswith(f"/{name}")]
        if len(found := exact or [ref for _, ref in choices]) > 1:
            paths = " and ".join(path for path, _ in choices[:2])
            raise SourceError(f"{self._place.name}: image {name} could be {paths}; unpack the right one")
        return found[0] if found else None

    def looked_in(self) -> str:
        """The places, for a message."""
        there = self._there + [path.name for path in self._place.paths("*.zip") + self._place.paths("*.tar")]
        packed = [path.name for path in self._place.folder.iterdir() if path.name.endswith(PACKED)]
        return ", ".join(there) + (f"; {', '.join(packed)} must be unpacked first" if packed else "")

    @functools.cached_property
    def _packed(self) -> dict[str, list[tuple[str, ImageRef]]]:
        """Last part of a name -> the members of zips and tars that have it."""
        found: dict[str, list[tuple[str, ImageRef]]] = defaultdict(list)
        for path, ref in self._members():
            found[path.rpartition("/")[2]].append((path, ref))
        return found

    def _members(self) -> Iterator[tuple[str, ImageRef]]:
        for archive in self._place.paths("*.zip"):
            for name in _members(archive):
                yield name, ImageRef(str(archive.resolve()), column=name)
        for archive in self._place.paths("*.tar"):
            tar = Tar(str(archive.resolve()))
            try:
                yield from ((member.name, tar.locate(member)) for member in tar.members())
            except TarDamage as damage:
                raise SourceError(f"{archive} {damage.detail}; fetch it again") from None


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise SourceError(f"{path} cannot be read as a zip: {error}; fetch it again") from None


def _members(path: Path) -> tuple[str, ...]:
    """The files in a zip, without folders and what macOS adds."""
    return _members_at(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _members_at(path: Path, changed: int) -> tuple[str, ...]:
    names = _zip(path).namelist()
    return tuple(name for name in names if not name.endswith("/") and not name.startswith("__MACOSX/"))


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is no UTF-8: {error}; fetch it again") from None
