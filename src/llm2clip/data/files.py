"""A sample from files that share a key (`00012.jpg`, `00012.txt`, `00012.json`), in a tar or a folder; and folders.

Only texts, JSON objects and pictures among the files are ever read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from llm2clip.artifacts import fingerprint
from llm2clip.data.bad import BadPicture, BadSamples
from llm2clip.data.bytes import read_bytes
from llm2clip.data.columns import Layout, find_layout, read_captions, require
from llm2clip.data.images import check_file
from llm2clip.data.sample import PictureRef, Reading, Sample
from llm2clip.errors import SourceError, UsageError

PICTURE_ENDINGS = frozenset(
    "jpg jpeg jpe jfif png webp gif bmp dib tif tiff avif heic heif jp2 j2k jpx ppm pgm pbm pnm ico qoi img".split()
)
TEXT_ENDINGS = frozenset({"txt", "text", "caption"})
IGNORED_ENDINGS = frozenset(
    "pkl pickle pyd pth pt ckpt npy npz ten cls id idx url tsv csv html xml md5 sha256 mp3 wav flac mp4 avi mov".split()
)
"""Never looked into, pickles above all."""
MAX_TEXT_BYTES = 1 << 24
"""Longer text and JSON members (16 MiB) are no captions."""
METADATA = tuple(f"metadata.{ending}" for ending in ("jsonl", "csv", "parquet"))
"""The table of a `datasets` image folder."""
NUM_SAMPLES_CHECKED = 20

Member = TypeVar("Member", contravariant=True)


class Store(Protocol[Member]):
    """Where members lie: a tar or a folder."""

    def text(self, member: Member) -> bytes:
        """The content of a text member; BadPicture if it cannot be read."""

    def locate(self, member: Member) -> PictureRef:
        """Where a picture member lies."""

    def check_picture(self, member: Member) -> None:
        """BadPicture if its first bytes are no picture's."""


def is_text(ending: str) -> bool:
    """Whether a member with this ending is read as text: `txt`, `json`, `short.txt`."""
    last = ending.rpartition(".")[2]
    return last == "json" or last in TEXT_ENDINGS


def may_be_picture(ending: str) -> bool:
    """Whether a member with this ending is taken for a picture; an unknown ending is, its content decides."""
    return not is_text(ending) and ending.rpartition(".")[2] not in IGNORED_ENDINGS


def choose_picture(endings: Mapping[str, Any], image: str | None) -> str | None:
    """The ending of a sample's picture: the one named, else the first known one, else the first that may be one.

    >>> choose_picture({"bin": 0, "JPG".lower(): 1, "txt": 2}, None)
    'jpg'
    """
    if image is not None:
        wanted = image.lower().lstrip(".")
        return wanted if wanted in endings else None
    known = [ending for ending in endings if ending.rpartition(".")[2] in PICTURE_ENDINGS]
    return next(iter([*known, *filter(may_be_picture, endings)]), None)


class Assembler:
    """Makes samples of members that share a key; JSON keys, `txt`, and `short` for `{key}.short.txt` are columns."""

    def __init__(self, reading: Reading, bad: BadSamples, store: Store[Any]) -> None:
        self.reading, self.bad, self.store = reading, bad, store
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def assemble(self, key: str, endings: Mapping[str, Any]) -> Sample | None:
        """The sample called `key` of its members by ending, or None if it is bad (counted)."""
        try:
            picture = self._picture(endings)
        except BadPicture as error:
            self.bad.add(key, error.cause, error.detail)
            return None
        values = read_values(key, endings, self.store, self.bad)
        if (columns := tuple(values)) not in self._layouts:
            self._layouts[columns] = find_layout(columns, captions=self.reading.captions, image="")
        captions = read_captions(values, self._layouts[columns], sample_id=key, bad=self.bad)
        if not captions:
            self.bad.add(key, "no caption", f"it has {', '.join([*endings, *values])}")
            return None
        return Sample(key, picture, captions)

    def _picture(self, endings: Mapping[str, Any]) -> PictureRef:
        ending = choose_picture(endings, self.reading.image)
        if ending is None:
            if not self.reading.pictures:
                return PictureRef("")
            raise BadPicture("no picture", f"it has only {', '.join(endings)}")
        ref = self.store.locate(endings[ending])
        if self.reading.pictures:
            if ref.length == 0:
                raise BadPicture("empty picture", f"{ref.path}: the {ending} has 0 bytes")
            self.store.check_picture(endings[ending])
        return ref


def read_values(key: str, endings: Mapping[str, Any], store: Store[Any], bad: BadSamples) -> dict[str, Any]:
    """The columns of a sample: keys of its JSON objects, and its text members by name (`txt`, `short`)."""
    values: dict[str, Any] = {}
    for ending in filter(is_text, endings):
        try:
            text = store.text(endings[ending]).decode("utf-8-sig", "surrogateescape")
        except BadPicture as error:
            bad.note(key, error.cause, error.detail)
            continue
        name, _, last = ending.rpartition(".")
        if last == "json":
            values = {**_json_object(key, ending, text, bad), **values}
        else:
            values[name or ending] = text
    return values


def _json_object(key: str, ending: str, text: str, bad: BadSamples) -> dict[str, Any]:
    try:
        record = json.loads(text)
        if isinstance(record, dict):
            return record
        damage = f"is {str(record)[:40]!r}, no object"
    except (ValueError, RecursionError) as error:
        damage = str(error)
    bad.note(key, "damaged JSON", f"{key}.{ending}: {damage}")
    return {}


def check_columns(path: str, samples: Sequence[Mapping[str, Any]], reading: Reading, store: Store[Any]) -> None:
    """Check that the first samples of a tar or folder have the pictures and captions asked for (else UsageError)."""
    unheard = BadSamples(1.0, quiet=True)
    columns: dict[str, None] = {}
    for endings in samples:
        columns |= dict.fromkeys(ending for ending in endings if not is_text(ending))
        columns |= dict.fromkeys(read_values("", endings, store, unheard))
    if not columns:
        return
    picture = next(filter(None, (choose_picture(endings, reading.image) for endings in samples)), None)
    texts = find_layout([c for c in columns if c != picture], captions=reading.captions, image="")
    layout = Layout(picture, texts.captions)
    require(layout, columns, path, captions=reading.captions, image=None, picture=reading.pictures)


def files_in(folder: str, *, word: str = "data") -> list[str]:
    """The files that a folder stands for: tars, tables, or the Arrow files of a saved dataset; none: its pictures.

    Raises:
        UsageError: if the folder is empty, ambiguous or something else.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if not names:
        raise UsageError(f"{word} {folder} is an empty folder")
    if "manifest.json" in names and "run.json" in names:
        raise UsageError(f"{word} {folder} was made by llm2clip; {word} takes pictures and captions")
    if "dataset_dict.json" in names:
        splits = [name for name in names if os.path.exists(os.path.join(folder, name, "state.json"))]
        if len(splits) != 1 and "train" not in splits:
            named = ", ".join(splits) or "none"
            raise UsageError(f"{word} {folder} holds the splits {named}; name one, as {folder}/SPLIT")
        folder = os.path.join(folder, "train" if "train" in splits else splits[0])
        return _by_ending(folder, sorted(os.listdir(folder)), ".arrow")
    if "state.json" in names and "dataset_info.json" in names:
        return _by_ending(folder, names, ".arrow")
    if tars := _by_ending(folder, names, ".tar"):
        return tars
    if metadata := [os.path.join(folder, name) for name in METADATA if name in names]:
        return metadata[:1]
    if any(name.endswith("_stats.json") for name in names) and any(
        os.path.isdir(os.path.join(folder, name)) for name in names
    ):
        return []  # img2dataset's plain files; the tables beside them speak of downloads
    tables = [_by_ending(folder, names, ending) for ending in (".parquet", ".jsonl", ".csv", ".tsv")]
    found = [paths for paths in tables if paths]
    if len(found) > 1 or (found and not found[0][0].endswith(".parquet") and len(found[0]) > 1):
        listed = ", ".join(os.path.basename(path) for paths in found for path in paths[:3])
        raise UsageError(f"{word} {folder} holds several tables ({listed}); name the one that is meant")
    return found[0] if found else []


def _by_ending(folder: str, names: Sequence[str], ending: str) -> list[str]:
    return [os.path.join(folder, name) for name in names if name.lower().endswith(ending)]


class FolderPart:
    """Pictures in a folder and its subfolders; `a.jpg` has its captions in `a.txt`, `a.short.txt` or `a.json`."""

    def __init__(self, path: str, reading: Reading) -> None:
        self.path = self.name = path
        self.reading = reading
        try:
            files = list(_files_below(path))
        except OSError as error:
            raise SourceError(f"{reading.word} {path} cannot be read: {error}") from None
        self._groups = _group([name for name, _ in files])
        self.size = fingerprint(files)

    def check(self) -> None:
        """Check that there are pictures with captions."""
        where = f"{self.reading.word} {self.path}"
        if not self._groups:
            raise UsageError(
                f"{where} holds no pictures, tars or tables; give a folder of one of them, or a file in it"
            )
        with_text = [endings for endings in self._groups.values() if any(map(is_text, endings))]
        if not with_text:
            raise UsageError(
                f"{where} holds {len(self._groups)} pictures and no captions; put a .txt or .json of the same "
                "name beside each, or a metadata.csv with the columns file_name and caption"
            )
        check_columns(self.path, with_text[:NUM_SAMPLES_CHECKED], self.reading, self)

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples, sorted by path."""
        assembler = Assembler(self.reading, bad, self)
        for key, endings in self._groups.items():
            if sample := assembler.assemble(key, endings):
                yield sample

    def locate(self, member: str) -> PictureRef:
        """Where a file lies."""
        return PictureRef(os.path.join(self.path, member))

    def text(self, member: str) -> bytes:
        """The content of a text file."""
        ref = self.locate(member)
        try:
            data = read_bytes(ref)
        except BadPicture as error:
            if error.cause == "empty picture":
                return b""
            raise
        if len(data) > MAX_TEXT_BYTES:
            raise BadPicture("text too large", f"{ref.path} has {len(data)} bytes")
        return data

    def check_picture(self, member: str) -> None:
        """Look at a picture's header."""
        check_file(os.path.join(self.path, member))


def _files_below(folder: str) -> Iterator[tuple[str, int]]:
    """Pictures and texts below a folder, by path relative to it, with their sizes; hidden ones left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            ending = os.path.splitext(name)[1][1:].lower()
            if not name.startswith(".") and (ending in PICTURE_ENDINGS or is_text(ending)):
                path = os.path.join(place, name)
                yield os.path.relpath(path, folder), os.stat(path, follow_symlinks=False).st_size


def _group(names: list[str]) -> dict[str, dict[str, str]]:
    """Files by the picture that they belong to, then by ending: `a.b.jpg` and `a.b.short.txt` -> `a.b`."""
    groups: dict[str, dict[str, str]] = {}
    texts = []
    for name in names:
        stem, ending = os.path.splitext(name)
        if is_text(ending[1:].lower()):
            texts.append((name, stem, ending))
        else:
            groups.setdefault(stem, {})[ending[1:].lower()] = name
    for name, stem, ending in texts:
        while stem not in groups and os.path.splitext(stem)[1]:
            stem, more = os.path.splitext(stem)
            ending = more + ending
        if stem in groups:
            groups[stem].setdefault(ending[1:].lower(), name)
    return groups
