"""A sample from files that share a key (`00012.jpg`, `00012.txt`, `00012.json`), as img2dataset lays them out.

Tars and folders both hold such files; only texts, JSON objects and pictures among them are ever read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from llm2clip.captions.bad import BadPicture, BadSamples
from llm2clip.captions.columns import Layout, find_layout, read_captions, require
from llm2clip.captions.parts import Reading
from llm2clip.captions.sample import PictureRef, Sample

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
    """Makes samples of members that share a key.

    Args:
        reading: which columns hold what; JSON keys, `txt`, and `short` for `{key}.short.txt` are columns.
        bad: counts what is wrong.
    """

    def __init__(self, reading: Reading, bad: BadSamples) -> None:
        self.reading, self.bad = reading, bad
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def assemble(self, key: str, endings: Mapping[str, Any], store: Store[Any]) -> Sample | None:
        """The sample called `key`, or None if it is bad (counted).

        Args:
            endings: ending -> member, in the order of the file.
            store: where the members lie.
        """
        try:
            picture = self._picture(endings, store)
        except BadPicture as error:
            self.bad.add(key, error.cause, error.detail)
            return None
        values = read_values(key, endings, store, self.bad)
        captions = read_captions(values, self._layout(tuple(values)), sample_id=key, bad=self.bad)
        if not captions:
            self.bad.add(key, "no caption", f"it has {', '.join([*endings, *values])}")
            return None
        return Sample(key, picture, captions)

    def _layout(self, columns: tuple[str, ...]) -> Layout:
        if columns not in self._layouts:
            self._layouts[columns] = find_layout(columns, captions=self.reading.captions, image="")
        return self._layouts[columns]

    def _picture(self, endings: Mapping[str, Any], store: Store[Any]) -> PictureRef:
        ending = choose_picture(endings, self.reading.image)
        if ending is None:
            if not self.reading.pictures:
                return PictureRef("")
            raise BadPicture("no picture", f"it has only {', '.join(endings)}")
        ref = store.locate(endings[ending])
        if self.reading.pictures:
            if ref.length == 0:
                raise BadPicture("empty picture", f"{ref.path}: the {ending} has 0 bytes")
            store.check_picture(endings[ending])
        return ref


def read_values(key: str, endings: Mapping[str, Any], store: Store[Any], bad: BadSamples) -> dict[str, Any]:
    """The columns of a sample: keys of its JSON objects, and its text members by name (`txt`, `short`)."""
    values: dict[str, Any] = {}
    for ending, member in endings.items():
        if not is_text(ending):
            continue
        try:
            text = store.text(member).decode("utf-8-sig", "surrogateescape")
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
    except (ValueError, RecursionError) as error:
        bad.note(key, "damaged JSON", f"{key}.{ending}: {error}")
        return {}
    if not isinstance(record, dict):
        bad.note(key, "damaged JSON", f"{key}.{ending} is {str(record)[:40]!r}, no object")
        return {}
    return record


def check_columns(path: str, samples: Sequence[Mapping[str, Any]], reading: Reading, store: Store[Any]) -> None:
    """Check that the first samples of a tar or folder have the pictures and captions asked for.

    Raises:
        UsageError: naming what is missing and what there is.
    """
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
