"""The forms in which benchmarks distribute their captions, each read into rows in the order of the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llm2clip.data.rows import TABLES, BadRow
from llm2clip.data.sample import BASE64, ImageRef
from llm2clip.data.tars import Member, Tar, group
from llm2clip.errors import SourceError
from llm2clip.eval.places import Text

READ_AT_ONCE = 1 << 20
"""Letters of a large JSON file."""
IMAGES = ("webp", "png", "jpg", "jpeg")
"""The endings that CLIP_benchmark's tars give their images."""
TAGGED = re.compile(r"[/:_#][a-z]{1,2}$")
"""How a word ends that carries its part of speech."""


@dataclass(frozen=True, slots=True)
class Row:
    """An image of a benchmark and its captions.

    Attributes:
        image: its name in the annotations, or where it lies.
        captions: language or part -> captions; "" where there is one part alone.
        where: the file and row, for messages.
    """

    image: str | ImageRef
    captions: Mapping[str, tuple[str, ...]]
    where: str


def row(image: Any, captions: Any, where: str, part: str = "") -> Row:
    """A row of one part.

    Raises:
        SourceError: if it is not an image's name and captions.
    """
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(image, str | ImageRef) or not image or not isinstance(captions, list | tuple) or not captions:
        raise SourceError(f"{where} holds no image with captions; fetch the file again")
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise SourceError(f"{where} holds an empty caption; fetch the file again")
    return Row(image, {part: tuple(caption.strip() for caption in captions)}, where)


def parsed(text: Text) -> Any:
    """A JSON file.

    Raises:
        SourceError: if it is none.
    """
    try:
        return json.loads(text.content)
    except ValueError as error:
        raise SourceError(f"{text.name} is damaged JSON ({error}); fetch it again") from None


def objects(text: Text) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a list, or one a line, each with its place for messages."""
    if text.content.lstrip().startswith("["):
        found = parsed(text)
    else:
        lines = (Text(f"{text.name} line {i}", line) for i, line in enumerate(text.lines(), 1) if line.strip())
        found = map(parsed, lines)
    for number, one in enumerate(found, 1):
        where = f"{text.name} row {number}"
        if not isinstance(one, dict):
            raise SourceError(f"{where} is no JSON object; fetch the file again")
        yield where, one


def first_objects(file: TextIO, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list one by one, no more of the file read than they take."""
    decoder, buffer = json.JSONDecoder(), file.read(READ_AT_ONCE).lstrip().removeprefix("[")
    while True:
        buffer = buffer.lstrip(" \r\n\t,")
        try:
            found, end = decoder.raw_decode(buffer)
        except ValueError:
            if buffer.startswith("]"):
                return
            if not (more := file.read(READ_AT_ONCE)):
                raise SourceError(f"{name} is damaged or cut off; fetch it again") from None
            buffer += more
            continue
        if not isinstance(found, dict):
            raise SourceError(f"{name} is no list of JSON objects; fetch it again")
        yield found
        buffer = buffer[end:]


def listed(text: Text) -> Iterator[Row]:
    """Salesforce's form: a JSON list of objects, each with an image and its captions."""
    return (row(one.get("image"), one.get("caption"), where) for where, one in objects(text))


def joined(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of one image as one, with the captions of all parts."""
    first: dict[str | ImageRef, Row] = {}
    captions: dict[str | ImageRef, dict[str, tuple[str, ...]]] = {}
    for one in rows:
        first.setdefault(one.image, one)
        captions.setdefault(one.image, {}).update(one.captions)
    return (Row(image, own, first[image].where) for image, own in captions.items())


def coco(text: Text) -> Iterator[Row]:
    """COCO's own form: images, and annotations that name them by number; images without captions are left out."""
    data = parsed(text)
    try:
        names = {image["id"]: image["file_name"] for image in data["images"]}
        captions: dict[Any, list[str]] = {number: [] for number in names}
        for annotation in data["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise SourceError(f"{text.name} is not in COCO's form: no {error}; fetch it again") from None
    for number, own in captions.items():
        if own:
            yield row(names[number], own, f"{text.name} image {number}")


def by_line(text: Text, pattern: str, *, header: bool = False, part: str = "") -> Iterator[Row]:
    """A caption a line, those of an image gathered; the pattern names its groups `image` and `caption`.

    Raises:
        SourceError: for a line that is not so.
    """
    found: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    for number, line in enumerate(text.lines(), 1):
        if (header and number == 1) or not line.strip():
            continue
        match = re.fullmatch(pattern, line)
        if match is None:
            raise SourceError(f"{text.name} line {number} is {line[:60]!r}, not an image's name and a caption")
        found.setdefault(match["image"], []).append(match["caption"])
        first.setdefault(match["image"], number)
    for image, captions in found.items():
        yield row(image, captions, f"{text.name} line {first[image]}", part)


def table(path: Path, image: str, caption: str, *, where: Mapping[str, str] | None = None) -> Iterator[Row]:
    """A CSV, TSV or Parquet table, an image a row, in which it may be embedded.

    Args:
        image: the column of its name or bytes.
        caption: the column of its caption or captions; a text that begins with "[" is a JSON list of them.
        where: column -> value of the rows that count.
    """
    found = TABLES[path.suffix[1:]](str(path))
    wanted = [image, caption, *(where or {})]
    if missing := [column for column in wanted if column not in found.columns]:
        raise SourceError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(found.columns[:20])}")
    read = [column for column in wanted if column != image or image not in found.embedded]
    for number, one in enumerate(found.rows(read)):
        place = f"{path.name} row {number}"
        if isinstance(one, BadRow):
            raise SourceError(f"{place}: {one.detail}; fetch the file again")
        if any(one.get(column) != value for column, value in (where or {}).items()):
            continue
        captions = one[caption]
        if isinstance(captions, str) and captions.startswith("["):
            captions = parsed(Text(place, captions))
        yield row(
            ImageRef(str(path), offset=number, column=image) if image in found.embedded else one[image], captions, place
        )


def members_of(tar: Tar) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a tar, each with its members by their endings.

    Raises:
        SourceError: if it is damaged.
    """
    groups, _, damage = group(tar.members())
    if damage is not None:
        raise SourceError(f"{tar.path} {damage.detail}; fetch it again")
    yield from groups.items()


def tars(paths: Sequence[Path]) -> Iterator[Row]:
    """The tars that CLIP_benchmark makes of a retrieval set: an image beside a .txt with a caption a line."""
    for path in paths:
        tar = Tar(str(path.resolve()))
        for key, members in members_of(tar):
            image = next((members[ending] for ending in IMAGES if ending in members), None)
            where = f"{path.name}: {key}"
            if image is None or "txt" not in members:
                raise SourceError(f"{where} is no image beside a .txt; fetch the tar again")
            text = Text(where, tar.text(members["txt"]).decode("utf-8", "replace"))
            yield row(tar.locate(image), text.lines(), where)


def base64_lines(path: Path) -> dict[str, ImageRef]:
    """Where the images of a TSV lie, by their ids: lines of an id, a tab and base64."""
    found, offset = {}, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            name, tab, _ = line.partition(b"\t")
            if not tab:
                raise SourceError(f"{path} line {number} is no id and image; fetch it again")
            start = len(name) + 1
            length = len(line.rstrip(b"\r\n")) - start
            found[name.decode("utf-8", "replace")] = ImageRef(str(path.resolve()), offset + start, length, BASE64)
            offset += len(line)
    return found


def untagged(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, if their captions carry no parts of speech ("man/n"), with which no score is comparable.

    Raises:
        SourceError: naming the first row of which most words carry one.
    """
    for one in rows:
        words = [word for captions in one.captions.values() for caption in captions for word in caption.split()]
        if len(words) > 1 and 2 * sum(bool(TAGGED.search(word)) for word in words) > len(words):
            raise SourceError(
                f"{one.where}: {' '.join(words)[:40]!r} carries parts of speech, which cost points; take a clean file"
            )
        yield one
