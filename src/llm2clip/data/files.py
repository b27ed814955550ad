"""A sample from files that share a key (`00012.jpg`, `00012.txt`, `00012.json`), in a tar or a folder; and folders.

Only texts, JSON objects and images among the files are ever read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llm2clip.artifacts import fingerprint, is_output, read_json
from llm2clip.data.bad import BadImage, BadSamples, logger
from llm2clip.data.bytes import read_bytes
from llm2clip.data.columns import Layout, find_layout, merge_columns, read_captions, require
from llm2clip.data.images import check_file
from llm2clip.data.sample import ImageRef, Reading, Sample
from llm2clip.data.spec import choose_split
from llm2clip.errors import SourceError, UsageError, setting, shown

IMAGE_ENDINGS = frozenset(
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
TABLE_ENDINGS = (".parquet", ".jsonl", ".csv", ".tsv")
NUM_SAMPLES_CHECKED = 20

Member = TypeVar("Member", contravariant=True)
T = TypeVar("T")


class Store(Protocol[Member]):
    """Where members lie: a tar or a folder."""

    def text(self, member: Member) -> bytes:
        """The content of a text member; BadImage if it cannot be read."""

    def locate(self, member: Member) -> ImageRef:
        """Where an image member lies."""

    def check_image(self, member: Member) -> None:
        """BadImage if its first bytes are no image's."""


def split_name(name: str) -> tuple[str, str] | None:
    """Key and ending of a file, split at its name's first dot as webdataset does; None for hidden files.

    >>> split_name("./a/0001.short.TXT")
    ('a/0001', 'short.txt')
    """
    folder, slash, file = name.removeprefix("./").rpartition("/")
    key, _, ending = file.partition(".")
    return (folder + slash + key, ending.lower()) if key else None


def group_members(members: Iterable[tuple[str, T]]) -> tuple[dict[str, dict[str, T]], list[str]]:
    """Members by key, then by ending, in their order; and the names that came again, which are left out.

    The key is what comes before the first dot, but where texts share more of their name with an image: then it is what
    they share.

    >>> names = "0001.jpg 0001.short.txt IMG_2021.05.01.jpg IMG_2021.05.01.json IMG_2021.05.02.jpg".split()
    >>> {key: list(endings) for key, endings in group_members((name, None) for name in names)[0].items()}
    {'0001': ['jpg', 'short.txt'], 'IMG_2021.05.01': ['jpg', 'json'], 'IMG_2021.05.02': ['jpg']}
    """
    groups: dict[str, dict[str, T]] = {}
    repeated: list[str] = []
    for name, member in members:
        key, ending = split_name(name) or ("", "")
        if key and ending not in groups.setdefault(key, {}):
            groups[key][ending] = member
        elif key:
            repeated.append(name)
    settled: dict[str, dict[str, T]] = {}
    for key, endings in groups.items():
        for more, own in _by_image(endings).items():
            settled[f"{key}.{more}" if more else key] = own
    return settled, repeated


def _by_image(endings: dict[str, T]) -> dict[str, dict[str, T]]:
    """A group as several, by what its images have before their last dot, if texts have the same; else as it is ("")."""
    stems = [stem for stem, _, last in map(_split_last, endings) if last in IMAGE_ENDINGS]
    owner = {
        ending: next((s for s in sorted(stems, key=len, reverse=True) if s and f"{ending}.".startswith(f"{s}.")), None)
        for ending in endings
        if is_text(ending)
    }
    if not any(owner.values()):
        return {"": endings}
    found: dict[str, dict[str, T]] = {stem: {} for stem in stems}
    shared: dict[str, T] = {}
    for ending, member in endings.items():
        stem, _, last = _split_last(ending)
        if last in IMAGE_ENDINGS:
            found[stem][last] = member
        elif place := owner.get(ending):
            found[place][ending[len(place) + 1 :]] = member
        else:
            shared[ending] = member  # such as one JSON file for several images
    return {stem: {**shared, **own} for stem, own in found.items()}


def _split_last(ending: str) -> tuple[str, str, str]:
    return ending.rpartition(".")


def is_text(ending: str) -> bool:
    """Whether a member with this ending is read as text: `txt`, `json`, `short.txt`."""
    last = ending.rpartition(".")[2]
    return last == "json" or last in TEXT_ENDINGS


def may_be_image(ending: str) -> bool:
    """Whether a member with this ending is taken for an image; an unknown ending is, its content decides."""
    return not is_text(ending) and ending.rpartition(".")[2] not in IGNORED_ENDINGS


def choose_image(endings: Mapping[str, Any], image: str | None) -> str | None:
    """The ending of a sample's image: the one named, else the first known one, else the first that may be one.

    >>> choose_image({"bin": 0, "JPG".lower(): 1, "txt": 2}, None)
    'jpg'
    """
    if image is not None:
        wanted = image.lower().lstrip(".")
        return wanted if wanted in endings else None
    known = [ending for ending in endings if ending.rpartition(".")[2] in IMAGE_ENDINGS]
    return next(iter([*known, *filter(may_be_image, endings)]), None)


class Assembler:
    """Makes samples of members that share a key; JSON keys, `txt`, and `short` for `{key}.short.txt` are columns."""

    def __init__(self, reading: Reading, bad: BadSamples, store: Store[Any]) -> None:
        self.reading, self.bad, self.store = reading, bad, store
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._told = False

    def assemble(self, key: str, endings: Mapping[str, Any]) -> Sample | None:
        """The sample called `key` of its members by ending, or None if it is bad (counted)."""
        try:
            image = self._image(key, endings)
        except BadImage as error:
            self.bad.add(key, error.cause, error.detail)
            return None
        values = read_values(key, endings, self.store, self.bad, lines=self.reading.text_lines)
        if not self._told and (name := next((n for n, value in values.items() if isinstance(value, Lines)), None)):
            self._told = True
            logger.info(
                "%s: its %s has %d lines, read as as many captions; where a text is one caption, say so by %s",
                key,
                name,
                len(values[name]),
                setting("text_lines", "one"),
            )
        if (columns := tuple(values)) not in self._layouts:
            self._layouts[columns] = find_layout(columns, captions=self.reading.captions, image="")
        captions = read_captions(values, self._layouts[columns], sample_id=key, bad=self.bad)
        if not captions:
            self.bad.add(key, "no caption", f"it has {', '.join([*endings, *values])}")
            return None
        return Sample(key, image, captions)

    def _image(self, key: str, endings: Mapping[str, Any]) -> ImageRef:
        ending = choose_image(endings, self.reading.image)
        if ending is None:
            if not self.reading.images:
                return ImageRef("")
            raise BadImage("no image", f"it has only {', '.join(endings)}")
        if self.reading.image is None and len(others := [e for e in endings if _split_last(e)[2] in IMAGE_ENDINGS]) > 1:
            self.bad.note(key, "image not used", f"of {', '.join(others)} only {ending} is read; name another by image")
        ref = self.store.locate(endings[ending])
        if self.reading.images:
            if ref.length == 0:
                raise BadImage("empty image", f"{ref.path}: the {ending} has 0 bytes")
            self.store.check_image(endings[ending])
        return ref


class Lines(list[str]):
    """The captions of a text with one a line."""


def caption_lines(text: str) -> str | Lines:
    r"""A text as its captions: one a line, or one in all where an empty line parts paragraphs.

    >>> caption_lines("a cat\nthe cat\n"), caption_lines("A cat.\n\nIt is grey.")
    (['a cat', 'the cat'], 'A cat.\n\nIt is grey.')
    """
    lines = re.split(r"\r\n|\n|\r", text.strip())
    return Lines(lines) if len(lines) > 1 and all(map(str.strip, lines)) else text


def read_values(
    key: str, endings: Mapping[str, Any], store: Store[Any], bad: BadSamples, *, lines: str = "auto"
) -> dict[str, Any]:
    """The columns of a sample: keys of its JSON objects, and its text members by name (`txt`, `short`)."""
    values: dict[str, Any] = {}
    for ending in filter(is_text, endings):
        try:
            text = store.text(endings[ending]).decode("utf-8-sig", "surrogateescape")
        except BadImage as error:
            bad.note(key, error.cause, error.detail)
            continue
        name, _, last = ending.rpartition(".")
        if last == "json":
            values = {**_json_object(key, ending, text, bad), **values}
        else:
            values[name or ending] = text if lines == "one" else caption_lines(text)
    return values


def _json_object(key: str, ending: str, text: str, bad: BadSamples) -> dict[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=merge_columns)
        if isinstance(record, dict):
            return record
        damage = f"is {shown(record, most=42)}, no object"
    except (ValueError, RecursionError) as error:
        damage = str(error)
    bad.note(key, "damaged JSON", f"{key}.{ending}: {damage}")
    return {}


def check_columns(path: str, samples: Sequence[Mapping[str, Any]], reading: Reading, store: Store[Any]) -> str:
    """What is read of the first samples of a tar or folder; UsageError if they lack what is asked for."""
    unheard = BadSamples(1.0, quiet=True)
    columns: dict[str, None] = {}
    for endings in samples:
        columns |= dict.fromkeys(ending for ending in endings if not is_text(ending))
        columns |= dict.fromkeys(read_values("", endings, store, unheard))
    if not columns:
        return ""
    image = next(filter(None, (choose_image(endings, reading.image) for endings in samples)), None)
    texts = find_layout([c for c in columns if c != image], captions=reading.captions, image="")
    layout = Layout(image, texts.captions)
    require(layout, columns, path, captions=reading.captions, image=None, needs_image=reading.images)
    return layout.told(columns)


def split_folder(folder: str, *, word: str = "data", split: str | None = None) -> str | None:
    """Where a folder holds splits, each in a folder with a table or a saved dataset of its own, the one to take.

    Raises:
        UsageError: if it has no such one, or which one is not said.
    """
    names = _names_in(folder)
    what = f"{word} {folder}"
    if "dataset_dict.json" in names:
        splits = [name for name in names if os.path.exists(os.path.join(folder, name, "state.json"))]
        return os.path.join(folder, choose_split(what, splits, split, usual="train"))
    has_own = any(name in METADATA or name.lower().endswith((".tar", *TABLE_ENDINGS)) for name in names)
    splits = [name for name in names if any(os.path.exists(os.path.join(folder, name, table)) for table in METADATA)]
    return os.path.join(folder, choose_split(what, splits, split)) if splits and not has_own else None


def files_in(folder: str, *, word: str = "data") -> list[str]:
    """The files that a folder stands for: tars, tables, or the Arrow files of a saved dataset; none: its images.

    Raises:
        UsageError: if the folder is empty, ambiguous or something else.
    """
    names = _names_in(folder)
    if not names:
        raise UsageError(f"{word} {folder} is an empty folder")
    if "manifest.json" in names and "run.json" in names:
        raise UsageError(f"{word} {folder} was made by llm2clip; {word} takes images and captions")
    if "state.json" in names and "dataset_info.json" in names:
        return _saved_dataset(folder)
    if tars := _by_ending(folder, names, ".tar"):
        return tars
    if metadata := [os.path.join(folder, name) for name in METADATA if name in names]:
        return metadata[:1]
    if any(name.endswith("_stats.json") for name in names) and any(
        os.path.isdir(os.path.join(folder, name)) for name in names
    ):
        return []  # img2dataset's plain files; the tables beside them speak of downloads
    tables = [_by_ending(folder, names, ending) for ending in TABLE_ENDINGS]
    found = [paths for paths in tables if paths]
    if len(found) > 1 or (found and not found[0][0].endswith(".parquet") and len(found[0]) > 1):
        listed = ", ".join(os.path.basename(path) for paths in found for path in paths[:3])
        raise UsageError(f"{word} {folder} holds several tables ({listed}); name the one that is meant")
    return found[0] if found else []


def _names_in(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _saved_dataset(folder: str) -> list[str]:
    """The Arrow files of a dataset that `save_to_disk` wrote: those that its state names, not caches beside them."""
    state = read_json(Path(folder, "state.json"))
    try:
        files = [os.path.join(folder, named["filename"]) for named in state["_data_files"]]
    except (KeyError, TypeError):
        raise SourceError(f"{folder}/state.json names no data files; save the dataset again") from None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UsageError(f"{folder} holds a selection that was saved without its rows; load it and save it again")
    return files


def _by_ending(folder: str, names: Sequence[str], ending: str) -> list[str]:
    return [os.path.join(folder, name) for name in names if name.lower().endswith(ending)]


class FolderPart:
    """Images in a folder and its subfolders; `a.jpg` has its captions in `a.txt`, `a.short.txt` or `a.json`."""

    def __init__(self, path: str, reading: Reading) -> None:
        self.path = self.name = path
        self.reading = reading
        try:
            files = list(_files_below(path))
        except OSError as error:
            raise SourceError(f"{reading.word} {path} cannot be read: {error}") from None
        self._groups, self._repeated = group_members((name, name) for name, _ in files)
        self.size = fingerprint(files)

    def check(self) -> str:
        """Check that there are images with captions."""
        where = f"{self.reading.word} {self.path}"
        if not self._groups:
            raise UsageError(f"{where} holds no images, tars or tables; give a folder of one of them, or a file in it")
        with_images = [own for own in self._groups.values() if any(_split_last(e)[2] in IMAGE_ENDINGS for e in own)]
        if not with_images:
            raise UsageError(f"{where} holds texts and no images beside them; give the folder that holds both")
        with_text = [endings for endings in with_images if any(map(is_text, endings))]
        if not with_text:
            raise UsageError(
                f"{where} holds {len(with_images)} images and no captions; put a .txt or .json of the same "
                "name beside each, or a metadata.csv with the columns file_name and caption"
            )
        return check_columns(self.path, with_text[:NUM_SAMPLES_CHECKED], self.reading, self)

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples, sorted by path."""
        for name in self._repeated:
            bad.note(name, "file twice in folder", f"{self.path}: another has the same name but for capital letters")
        assembler = Assembler(self.reading, bad, self)
        for key, endings in self._groups.items():
            if not any(_split_last(ending)[2] in IMAGE_ENDINGS for ending in endings):
                bad.note(key, "text without an image", f"{self.path}: {', '.join(endings)}")
            elif sample := assembler.assemble(key, endings):
                yield sample

    def locate(self, member: str) -> ImageRef:
        """Where a file lies."""
        return ImageRef(os.path.join(self.path, member))

    def text(self, member: str) -> bytes:
        """The content of a text file."""
        ref = self.locate(member)
        try:
            data = read_bytes(ref)
        except BadImage as error:
            if error.cause == "empty image":
                return b""
            raise
        if len(data) > MAX_TEXT_BYTES:
            raise BadImage("text too large", f"{ref.path} has {len(data)} bytes")
        return data

    def check_image(self, member: str) -> None:
        """Look at an image's header."""
        check_file(os.path.join(self.path, member))


def _files_below(folder: str) -> Iterator[tuple[str, int]]:
    """Images and texts below a folder, by path relative to it, with their sizes; hidden ones left out."""
    for place, folders, names in os.walk(folder):
        hidden_or_ours = (name for name in folders if name.startswith(".") or is_output(os.path.join(place, name)))
        folders[:] = sorted(set(folders) - set(hidden_or_ours))
        for name in sorted(names):
            ending = os.path.splitext(name)[1][1:].lower()
            if not name.startswith(".") and (ending in IMAGE_ENDINGS or is_text(ending)):
                path = os.path.join(place, name)
                yield os.path.relpath(path, folder), os.stat(path, follow_symlinks=False).st_size
