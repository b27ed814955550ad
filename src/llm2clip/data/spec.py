"""The source grammar: paths, globs, brace ranges, folders, Hub ids and URLs -> a list of files.

captions.csv   shards/{00000..00012}.tar   "data/**/*.parquet"   images/   hf:org/name:train
hf://datasets/org/name/*.tar   s3://bucket/{a,b}.tar   https://host/00000.tar
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm2clip.artifacts import is_output
from llm2clip.data.bad import logger
from llm2clip.data.urls import filesystem_of, is_url, suffix, url_errors
from llm2clip.errors import SourceError, UsageError, setting, shortened
from llm2clip.on_hub import offline, unreachable

MAX_EXPANSION = 1_000_000
"""Files that one brace range may stand for."""
HUB_ID = re.compile(r"hf:(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")


@dataclass(frozen=True, slots=True)
class File:
    """A file or folder (of size 0) of a source, by its absolute path or URL."""

    path: str
    size: int
    label: str = ""
    """What its samples are called by, if not by its path."""
    also: str = ""
    """A folder where what it names may lie, beside its own."""

    @property
    def kind(self) -> str:
        """What it is by its ending ("tar", "csv", ...), or "folder"."""
        return "folder" if not is_url(self.path) and os.path.isdir(self.path) else suffix(self.path)[1:]


def find_files(spec: str, *, word: str = "data", revision: str | None = None, split: str | None = None) -> list[File]:
    """The files and folders that `spec` stands for, sorted.

    Raises:
        UsageError: if there are none, or one of a brace range is missing; errors call the source by `word`.
        SourceError: if a remote place cannot be listed, or a Hub dataset not be fetched.
    """
    if spec.startswith("hf:") and not spec.startswith("hf://"):
        return _find_hub(spec, word, revision, split)
    return _find_remote(spec, word) if is_url(spec) else _find_local(spec, word)


def expand_braces(text: str, *, word: str = "data") -> Iterator[str]:
    """`text` with each `{a,b}` and `{00..12}` replaced by its members, leftmost slowest; zeros in front are kept.

    >>> list(expand_braces("{a,b}/{08..10}.tar"))[1:4]
    ['a/09.tar', 'a/10.tar', 'b/08.tar']
    """
    choices = [list(_choices(piece, word)) for piece in re.split(r"(\{[^{}]*\})", text)]
    if (total := math.prod(map(len, choices))) > MAX_EXPANSION:
        raise UsageError(f"{word} {text} stands for {total} files; name at most {MAX_EXPANSION}")
    return map("".join, itertools.product(*choices))


def _choices(piece: str, word: str) -> Iterator[str]:
    numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
    if numbers:
        first, last = numbers.groups()
        if int(last) - int(first) >= MAX_EXPANSION:
            raise UsageError(f"{word}: range {piece} is too long; name at most {MAX_EXPANSION} files")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        return (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    if piece.startswith("{") and "," in piece:
        return iter(piece[1:-1].split(","))
    return iter([piece])


def local_file(path: str, *, word: str = "data", label: str = "") -> File:
    """A file or folder on this machine."""
    try:
        return File(os.path.abspath(path), 0 if os.path.isdir(path) else os.stat(path).st_size, label)
    except OSError as error:
        raise SourceError(f"{word} {path} cannot be read: {error.strerror}") from None


def _find_local(spec: str, word: str) -> list[File]:
    spec = os.path.expanduser(spec)
    if os.path.exists(spec):  # also names that really hold braces or stars
        return [local_file(spec, word=word)]
    paths: list[str] = []
    missing: list[str] = []
    for part in expand_braces(spec, word=word):
        found = _matches(part) if glob.has_magic(part) else [part] * os.path.exists(part)
        paths += found
        missing += [part] * (not found)
    if not paths:
        what = "nothing matches" if glob.has_magic(spec) or missing != [spec] else "no such file or folder"
        raise UsageError(f"{word} {spec}: {what}; give a path, glob, brace range, hf:org/name or URL")
    if missing:
        raise UsageError(f"{word} {spec}: {missing[0]} is missing ({len(missing)} missing in all, {len(paths)} found)")
    return [local_file(path, word=word) for path in paths]


def _matches(pattern: str) -> list[str]:
    """The files that match, but those in folders that a run of ours writes below the pattern's fixed part."""
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    ours: dict[Path, bool] = {fixed: False, **dict.fromkeys(fixed.parents, False)}

    def within(folder: Path) -> bool:
        if folder not in ours:
            ours[folder] = is_output(folder) or within(folder.parent)
        return ours[folder]

    return sorted(path for path in glob.glob(pattern, recursive=True) if not within(Path(path).parent))


def _find_remote(spec: str, word: str) -> list[File]:
    files: list[File] = []
    parts = expand_braces(spec, word=word)
    try:
        for part in parts:
            filesystem, path = filesystem_of(part)
            if glob.has_magic(re.split(r"[?#]", path)[0]):
                found = filesystem.glob(path, detail=True)
                files += [File(filesystem.unstrip_protocol(p), found[p].get("size") or 0) for p in sorted(found)]
            else:
                files.append(File(part, filesystem.info(path).get("size") or 0))
    except FileNotFoundError as error:
        raise UsageError(f"{word} {spec}: {error} does not exist, or its server does not answer") from None
    except url_errors() as error:
        raise SourceError(f"{word} {spec} cannot be reached: {error}") from None
    if not files:
        raise UsageError(f"{word} {spec}: nothing matches")
    return files


def _find_hub(spec: str, word: str, revision: str | None, wanted: str | None) -> list[File]:
    """The Arrow files of a Hub dataset, fetched once by `datasets`: of the split named, the only one, or "train"."""
    form = HUB_ID.fullmatch(spec)
    if form is None:
        raise UsageError(f"{word} {spec} is no Hub dataset; write hf:org/name or hf:org/name:split")
    from huggingface_hub import constants

    dataset = _load_dataset(f"{word} {spec}", form["id"], form["config"], revision)
    split = choose_split(f"{word} {spec}", list(dataset), form["split"] or wanted, usual="train")
    label = f"{form['id']}{'/' + form['config'] if form['config'] else ''}:{split}"
    paths = [cached["filename"] for cached in dataset[split].cache_files]
    # its images are files of the Hub's cache, and the table that names them lies in that of `datasets`
    cache = os.path.join(constants.HF_HUB_CACHE, "--".join(["datasets", *form["id"].split("/")]))
    files = [local_file(path, word=word, label=f"{label}/{i:05d}") for i, path in enumerate(paths)]
    return [replace(file, also=cache) for file in files]


def choose_split(what: str, splits: Sequence[str], wanted: str | None, *, usual: str | None = None) -> str:
    """The split to take of those that a source holds: the one asked for, the only one, or the usual one (told of).

    Raises:
        UsageError: if there is no such one, or none is asked for; `what` is the source.
    """
    listed = ", ".join(splits) or "none"
    if wanted is not None and wanted not in splits:
        raise UsageError(f"{what} has no split {wanted!r}; it has {listed}")
    chosen = wanted or (splits[0] if len(splits) == 1 else usual)
    if chosen is None or chosen not in splits:
        raise UsageError(f"{what} holds the splits {listed}; name one by {setting('split', 'NAME')}")
    if not wanted and len(splits) > 1:
        logger.info("%s: taking the split %s of %s", what, chosen, listed)
    return chosen


def _load_dataset(what: str, name: str, config: str | None, revision: str | None) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    no_network = unreachable(name, revision=revision, kind="dataset", given=what)
    try:
        with offline() if no_network else contextlib.nullcontext():
            return load_dataset(name, config, revision=revision)
    except DatasetNotFoundError as error:
        raise UsageError(f"{what} is not on the Hub, or you have no access: {_flat(error)}") from None
    except (DatasetsError, RuntimeError, *url_errors()) as error:
        raise SourceError("; ".join(filter(None, [f"{what} cannot be loaded: {_flat(error)}", no_network]))) from None


def _flat(error: Exception) -> str:
    return shortened(str(error))
