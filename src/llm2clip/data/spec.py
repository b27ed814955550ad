"""The source grammar: paths, globs, brace ranges, folders, `hf:` ids and URLs -> a sorted list of files.

captions.csv   shards/{00000..00012}.tar   "data/**/*.parquet"   pictures/   hf:org/name:train
hf://datasets/org/name/*.tar   s3://bucket/{a,b}.tar   https://host/00000.tar
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm2clip.captions.reading import filesystem_of, is_url, url_errors
from llm2clip.errors import SourceError, UsageError

SUFFIXES = {
    **{".tar": "tar", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"},
    **{".jsonl": "json", ".jsonlines": "json", ".ndjson": "json", ".json": "json"},
}
"""File name ending -> reader."""
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
MAX_EXPANSION = 1_000_000
"""Files that one brace range may stand for."""


@dataclass(frozen=True, slots=True)
class File:
    """A file or folder of a source.

    Attributes:
        path: absolute path, or a URL.
        size: bytes; 0 for a folder.
    """

    path: str
    size: int

    @property
    def kind(self) -> str:
        """What reads it: "tar", "csv", "json", "parquet", "arrow" or "folder"."""
        return "folder" if not is_url(self.path) and os.path.isdir(self.path) else SUFFIXES[suffix(self.path)]


def find_files(spec: str) -> list[File]:
    """The files and folders that `spec` stands for, sorted.

    Raises:
        UsageError: if there are none, one of a brace range is missing, or an ending is unknown.
        SourceError: if a remote place cannot be listed.
    """
    files = _find_remote(spec) if is_url(spec) else _find_local(spec)
    for file in files:
        if is_url(file.path) or not os.path.isdir(file.path):
            _check_suffix(file.path)
    return files


def expand_braces(text: str) -> Iterator[str]:
    """`text` with each `{a,b}` and `{00..12}` replaced by its members, leftmost slowest; zeros in front are kept.

    Raises:
        UsageError: for a range of more than a million.

    >>> list(expand_braces("{a,b}/{08..10}.tar"))[1:4]
    ['a/09.tar', 'a/10.tar', 'b/08.tar']
    """
    pieces = re.split(r"(\{[^{}]*\})", text)
    choices = [list(_choices(piece)) for piece in pieces]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > MAX_EXPANSION:
        raise UsageError(f"--data {text} stands for {total} files; name at most {MAX_EXPANSION}")
    return ("".join(parts) for parts in itertools.product(*choices))


def _choices(piece: str) -> Iterator[str]:
    numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
    if numbers:
        first, last = numbers.groups()
        if int(last) - int(first) >= MAX_EXPANSION:
            raise UsageError(f"--data: range {piece} is too long; name at most {MAX_EXPANSION} files")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        return (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    if piece.startswith("{") and "," in piece:
        return iter(piece[1:-1].split(","))
    return iter([piece])


def suffix(path: str) -> str:
    """The file name's ending, lower case; a URL's query is not part of it.

    >>> suffix("https://host/A.TAR?download=1")
    '.tar'
    """
    name = re.split(r"[?#]", path)[0] if is_url(path) else path
    return os.path.splitext(name)[1].lower()


def _check_suffix(path: str) -> None:
    found = suffix(path)
    if found in COMPRESSED:
        raise UsageError(f"--data {path} is compressed; unpack it first, pictures are read by random access")
    if found not in SUFFIXES:
        other = "URL/*.tar" if is_url(path) else "a folder, hf:org/name"
        raise UsageError(f"--data {path}: unknown ending {found!r}; give {other}, {', '.join(SUFFIXES)}")


def _find_local(spec: str) -> list[File]:
    spec = os.path.expanduser(spec)
    if os.path.exists(spec):  # also names that really hold braces or stars
        return [_local_file(spec)]
    paths: list[str] = []
    missing: list[str] = []
    for part in expand_braces(spec):
        found = sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part] * os.path.exists(part)
        paths += found
        missing += [part] * (not found)
    if not paths:
        what = "nothing matches" if glob.has_magic(spec) or missing != [spec] else "no such file or folder"
        raise UsageError(f"--data {spec}: {what}; give a path, glob, brace range, hf:org/name or URL")
    if missing:
        raise UsageError(f"--data {spec}: {missing[0]} is missing ({len(missing)} missing in all, {len(paths)} found)")
    return [_local_file(path) for path in paths]


def _local_file(path: str) -> File:
    try:
        return File(os.path.abspath(path), 0 if os.path.isdir(path) else Path(path).stat().st_size)
    except OSError as error:
        raise SourceError(f"--data {path} cannot be read: {error.strerror}") from None


def _find_remote(spec: str) -> list[File]:
    files: list[File] = []
    parts = expand_braces(spec)
    try:
        for part in parts:
            filesystem, path = filesystem_of(part)
            name = re.split(r"[?#]", path)[0]
            if glob.has_magic(name):
                found = filesystem.glob(path, detail=True)
                files += [File(filesystem.unstrip_protocol(p), found[p].get("size") or 0) for p in sorted(found)]
            else:
                files.append(File(part, filesystem.info(path).get("size") or 0))
    except FileNotFoundError as error:
        raise UsageError(f"--data {spec}: {error} does not exist, or its server does not answer") from None
    except url_errors() as error:
        raise SourceError(f"--data {spec} cannot be reached: {error}") from None
    if not files:
        raise UsageError(f"--data {spec}: nothing matches")
    return files
