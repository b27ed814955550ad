"""Folders: what a folder holds, and pictures with `.txt` or `.json` files beside them as a source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from llm2clip.artifacts import fingerprint
from llm2clip.captions.bad import BadPicture, BadSamples
from llm2clip.captions.members import (
    MAX_TEXT_BYTES,
    PICTURE_ENDINGS,
    Assembler,
    check_columns,
    is_text,
)
from llm2clip.captions.parts import Reading
from llm2clip.captions.pictures import check_file
from llm2clip.captions.reading import read_bytes
from llm2clip.captions.sample import PictureRef, Sample
from llm2clip.errors import SourceError, UsageError

METADATA = tuple(f"metadata.{ending}" for ending in ("jsonl", "csv", "parquet"))
"""The table of a `datasets` image folder."""
NUM_SAMPLES_CHECKED = 20


def files_in(folder: Path) -> list[Path]:
    """The files that a folder stands for: tars, tables, or the Arrow files of a saved dataset; none: its pictures.

    Raises:
        UsageError: if the folder is empty, ambiguous or something else.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    if not names:
        raise UsageError(f"--data {folder} is an empty folder")
    if "manifest.json" in names and "run.json" in names:
        raise UsageError(f"--data {folder} was made by llm2clip; --data takes pictures and captions")
    if "dataset_dict.json" in names:
        return _split_files(folder, names)
    if "state.json" in names and "dataset_info.json" in names:
        return _by_ending(folder, names, ".arrow")
    if tars := _by_ending(folder, names, ".tar"):
        return tars
    if metadata := [folder / name for name in METADATA if name in names]:
        return metadata[:1]
    if any(name.endswith("_stats.json") for name in names) and any((folder / name).is_dir() for name in names):
        return []  # img2dataset's plain files; the tables beside them speak of downloads
    tables = {ending: _by_ending(folder, names, ending) for ending in (".parquet", ".jsonl", ".csv", ".tsv")}
    found = [paths for paths in tables.values() if paths]
    if len(found) > 1 or (found and found[0][0].suffix != ".parquet" and len(found[0]) > 1):
        listed = ", ".join(path.name for paths in found for path in paths[:3])
        raise UsageError(f"--data {folder} holds several tables ({listed}); name the one that is meant")
    return found[0] if found else []


def _by_ending(folder: Path, names: list[str], ending: str) -> list[Path]:
    return [folder / name for name in names if name.lower().endswith(ending)]


def _split_files(folder: Path, names: list[str]) -> list[Path]:
    splits = [name for name in names if (folder / name / "state.json").exists()]
    if len(splits) != 1 and "train" not in splits:
        raise UsageError(f"--data {folder} holds the splits {', '.join(splits) or 'none'}; name one, as {folder}/SPLIT")
    chosen = folder / ("train" if "train" in splits else splits[0])
    return _by_ending(chosen, sorted(os.listdir(chosen)), ".arrow")


class FolderPart:
    """Pictures in a folder and its subfolders; `a.jpg` has its captions in `a.txt`, `a.short.txt` or `a.json`.

    Args:
        path: the folder.
        reading: how its files are understood.
    """

    def __init__(self, path: str, reading: Reading) -> None:
        self.path, self.reading = path, reading
        files = list(_files_below(path))
        self._groups = _group([name for name, _ in files])
        self.size = fingerprint(files)

    def check(self) -> None:
        """Check that there are pictures with captions."""
        if not self._groups:
            raise UsageError(
                f"--data {self.path} holds no pictures, tars or tables; give a folder of one of them, or a file in it"
            )
        first = list(self._groups.values())
        with_text = [endings for endings in first if any(map(is_text, endings))]
        if not with_text:
            raise UsageError(
                f"--data {self.path} holds {len(first)} pictures and no captions; put a .txt or .json of the same "
                "name beside each, or a metadata.csv with the columns file_name and caption"
            )
        check_columns(self.path, with_text[:NUM_SAMPLES_CHECKED], self.reading, self)

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples, sorted by path."""
        assembler = Assembler(self.reading, bad)
        for key, endings in self._groups.items():
            if sample := assembler.assemble(key, endings, self):
                yield sample

    def locate(self, member: str) -> PictureRef:
        """Where a file lies."""
        return PictureRef(os.path.join(self.path, member))

    def text(self, member: str) -> bytes:
        """The content of a text file."""
        path = os.path.join(self.path, member)
        try:
            data = read_bytes(PictureRef(path))
        except BadPicture as error:
            if error.cause == "empty picture":
                return b""
            raise
        if len(data) > MAX_TEXT_BYTES:
            raise BadPicture("text too large", f"{path} has {len(data)} bytes")
        return data

    def check_picture(self, member: str) -> None:
        """Look at a picture's header."""
        check_file(os.path.join(self.path, member))


def _files_below(folder: str) -> Iterator[tuple[str, int]]:
    """Pictures and texts below a folder, by path relative to it, with their sizes; hidden ones left out."""
    try:
        for place, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                ending = os.path.splitext(name)[1][1:].lower()
                if not name.startswith(".") and (ending in PICTURE_ENDINGS or is_text(ending)):
                    path = os.path.join(place, name)
                    yield os.path.relpath(path, folder), os.stat(path, follow_symlinks=False).st_size
    except OSError as error:
        raise SourceError(f"--data {folder} cannot be read: {error}") from None


def _group(names: list[str]) -> dict[str, dict[str, str]]:
    """Files by the picture that they belong to, then by ending: `a.b.jpg` and `a.b.short.txt` -> `a.b`."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        stem, ending = os.path.splitext(name)
        if not is_text(ending[1:].lower()):
            groups.setdefault(stem, {})[ending[1:].lower()] = name
    for name in names:
        stem, ending = os.path.splitext(name)
        if not is_text(ending[1:].lower()):
            continue
        while stem not in groups and os.path.splitext(stem)[1]:
            stem, more = os.path.splitext(stem)
            ending = more + ending
        if stem in groups:
            groups[stem].setdefault(ending[1:].lower(), name)
    return groups
