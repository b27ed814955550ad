"""Which column is the image, which hold captions of which kind, and the captions in a row's values."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip.data.bad import BadSamples
from llm2clip.errors import UsageError, setting, shown

IMAGE_COLUMNS = (
    "image jpg jpeg png webp img picture photo pic image_path img_path picture_path photo_path image_filepath "
    "image_file img_file image_filename image_name filepath file_path file_name filename file path"
).split()
"""Usual names of the image's column, the likeliest first."""
RAW_COLUMNS = "caption captions text texts raw title titles description descriptions sentence sentences alt alt_text"
RAW_RANKS = {name: rank for rank, name in enumerate(RAW_COLUMNS.split())} | {"txt": 99}
"""Usual names of a plain caption; the first present counts, and beside it always a tar's `.txt`."""
MAKERS = ("", "sv", "lla", "ib")
KINDS = {f"{kind}{maker}": (kind, rank) for kind in ("short", "long") for rank, maker in enumerate(MAKERS)}
KINDS |= {"dense": ("long", 4), "detailed": ("long", 5), "raw": ("raw", 0)}
"""`{name}_caption` and the like -> kind, rank among the columns of that kind. DreamLIP's captions come from
ShareGPT4V (SV), LLaVA (LLA) and InstructBLIP (IB); the official LLM2CLIP trains on the SV ones."""
LANGUAGES = frozenset(
    "ar bg bn ca cs da de el en es et fa fi fil fr gl he hi hr hu id it ja ka ko lt lv mi ms nl no pl pt quz ro ru sk "
    "sl sr sv sw ta te th tr uk ur vi zh".split()
)
"""`caption_zh`, `zh_caption` -> kind "zh"."""
USUAL_KINDS = ("raw", "short", "long", *sorted(LANGUAGES))
"""The kinds that captions without named columns can be of."""
SENTENCE_KEYS = ("raw", "caption", "text", "sentence")
"""Where a caption that is an object, as Karpathy's sentences are, has its text."""
UNSEEN = frozenset({"Cc", "Cf", "Cn", "Zl", "Zp", "Zs"})
"""Unicode's categories of what leaves no ink: controls, formats (zero-width ones), unassigned, separators."""
BLANKS = frozenset("\u034f\u115f\u1160\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10))))
"""Letters and marks that leave none either: fillers, the empty Braille cell, variation selectors."""
NOT_CAPTIONS = frozenset({"caption_id", "text_id", "description_id"})  # numbers, not Indonesian
MOST_TOLD = 10
STEM = "captions?|texts?|descriptions?"


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a table that matter: the image's, if there is one, and those of each kind of caption."""

    image: str | None
    captions: Mapping[str, tuple[str, ...]]
    folder: str | None = None
    """The column of the folder that the image's name is relative to, as in Karpathy's tables."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them, the captions' first."""
        texts = [column for columns in self.captions.values() for column in columns]
        return tuple(dict.fromkeys([*texts, *filter(None, [self.image, self.folder])]))

    def told(self, columns: Collection[str]) -> str:
        """What is read of a table with these columns, and what is not, for a log.

        >>> Layout("file", {"raw": ("caption",), "zh": ("a", "b")}).told(["file", "caption", "a", "b", "url"])
        'image from file; captions raw from caption, zh from a and b; not read: url'
        """
        place = " in ".join(filter(None, [self.image, self.folder]))
        kinds = ", ".join(f"{kind} from {' and '.join(names)}" for kind, names in self.captions.items())
        unread = [column for column in columns if column not in self.columns]
        more = f" and {len(unread) - MOST_TOLD} more" if len(unread) > MOST_TOLD else ""
        parts = [f"image from {place}"] if place else []
        parts += [f"captions {kinds}"] if kinds else []
        parts += [f"not read: {', '.join(unread[:MOST_TOLD])}{more}"] if unread else []
        return "; ".join(parts)

    def name_in(self, row: Mapping[str, Any]) -> str:
        """The image that a row names, with its folder; empty if it holds the image itself, or nothing."""
        name = name_in(row.get(self.image)) if self.image else ""
        folder = name_in(row.get(self.folder)) if self.folder and name else ""
        return f"{folder.rstrip('/')}/{name}" if folder else name


def find_layout(
    columns: Collection[str], *, captions: Mapping[str, str], image: str | None, images: Collection[str] = ()
) -> Layout:
    """The image's and the captions' columns: as the user named them, otherwise by their usual names.

    Named columns that are absent are left out; `require` complains about them.

    Args:
        columns: all columns there are.
        captions, image: as the user named them, or empty.
        images: columns whose type says that they hold images; taken before any name.

    Example:
        >>> find_layout(["Image Path", "raw_caption", "shortSV_captions"], captions={}, image=None)
        Layout(image='Image Path', captions={'raw': ('raw_caption',), 'short': ('shortSV_captions',)}, folder=None)
    """
    if image is not None:
        column = image if image in columns else None
    else:
        usual = image_columns(columns)
        column = next(iter([*(c for c in usual if c in images), *images, *usual]), None)
    if captions:
        named = {
            kind: tuple(c for c in split_columns(value, columns) if c in columns) for kind, value in captions.items()
        }
    else:
        named = _usual_captions([name for name in columns if name != column])
    return Layout(column, {kind: found for kind, found in named.items() if found})


def image_columns(columns: Collection[str]) -> list[str]:
    """Those with a usual name of the image's column, the likeliest first."""
    by_name = {_plain(column): column for column in reversed(list(columns))}
    return [by_name[name] for name in IMAGE_COLUMNS if name in by_name]


def name_in(value: Any) -> str:
    """The path in an image's cell; empty if it holds bytes, or nothing; of several cells, the first that has one."""
    if isinstance(value, list):
        return next(filter(None, map(name_in, value)), "")
    if isinstance(value, Mapping) and not value.get("bytes"):
        value = value.get("path")
    return value.strip() if isinstance(value, str) else ""


def require(
    layout: Layout,
    columns: Collection[str],
    where: str,
    *,
    captions: Mapping[str, str],
    image: str | None,
    needs_image: bool,
) -> None:
    """Check that the layout has what the user named, an image if asked for, and captions.

    Raises:
        UsageError: naming the missing column and those there are.
    """
    there = f"its columns are {', '.join(list(columns)[:20]) or 'none'}"
    for kind, value in captions.items():
        for column in split_columns(value, columns):
            if column not in columns:
                raise UsageError(
                    f"{where} has no column {column!r} ({setting('captions', {kind: value})})"
                    f"{_near(column, columns)}; {there}"
                )
    if image is not None and image not in columns:
        raise UsageError(f"{where} has no column {image!r} ({setting('image', image)}){_near(image, columns)}; {there}")
    if needs_image and layout.image is None:
        raise UsageError(f"{where} has no column that looks like images; give {setting('image', 'COLUMN')}; {there}")
    if not layout.captions:
        raise UsageError(
            f"{where} has no column that looks like captions; give {setting('captions', {'KIND': 'COLUMN'})}; {there}"
        )


def split_columns(value: str, columns: Collection[str]) -> list[str]:
    """The columns that `--captions kind=value` names: one, or several joined by commas."""
    return [value] if value in columns else [part.strip() for part in value.split(",")]


def read_captions(
    values: Mapping[str, Any], layout: Layout, *, sample_id: str, bad: BadSamples
) -> dict[str, tuple[str, ...]]:
    """The captions in a row by kind, stripped, each once; empty ones and what is no text are counted in `bad`."""
    captions = {}
    for kind, columns in layout.captions.items():
        texts = [text for column in columns for text in _texts(values.get(column), column, sample_id, bad)]
        if texts:
            captions[kind] = tuple(dict.fromkeys(texts))
    return captions


def _texts(value: Any, column: str, sample_id: str, bad: BadSamples) -> list[str]:
    if value is None or value != value:  # null, or the NaN that data frames write for it
        return []
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item, column, sample_id, bad)]
    if isinstance(value, Mapping) and (inner := next((key for key in SENTENCE_KEYS if key in value), None)):
        return _texts(value[inner], column, sample_id, bad)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        bad.note(sample_id, "caption not text", f"{column} is {shown(value, most=42)}")
        return []
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        bad.note(sample_id, "caption not UTF-8", f"{column} is {value[:40]!a}")
        return []
    text = value.strip()
    if not any(map(_is_visible, text)):  # ends at the first letter
        bad.note(sample_id, "empty caption", f"{column} is {ascii(text) if text else 'empty'}")
        return []
    return [text]


def _is_visible(letter: str) -> bool:
    return unicodedata.category(letter) not in UNSEEN and letter not in BLANKS


def merge_columns(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Names and values as a row; what several columns of one name hold is a list, in their order.

    >>> merge_columns([("image", "a.jpg"), ("caption", "one cat"), ("caption", "two cats")])
    {'image': 'a.jpg', 'caption': ['one cat', 'two cats']}
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        for name in [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
            row[name] = [value for other, value in pairs if other == name]
    return row


def _usual_captions(columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[tuple[int, str, str]]] = {}
    for column in columns:
        if usual := _kind_of(column):
            kind, rank, base = usual
            found.setdefault(kind, []).append((rank, base, column))
    chosen = {}
    for kind, candidates in found.items():
        first = min(candidates, key=lambda candidate: candidate[0])
        chosen[kind] = tuple(c for _, base, c in candidates if base in (first[1], "txt"))
    return chosen


def _kind_of(column: str) -> tuple[str, int, str] | None:
    """Kind, rank within the kind, and the name without its number (`caption_3` -> `caption`)."""
    name = _plain(column)
    base = re.sub(r"(?<=[a-z])_?\d+$", "", name)
    if base in NOT_CAPTIONS:
        return None
    if base in RAW_RANKS:
        return "raw", RAW_RANKS[base], base
    stem = re.sub(rf"^(?:{STEM})_|_(?:{STEM})$", "", base, count=1)
    if stem in KINDS:
        return *KINDS[stem], base
    if stem in LANGUAGES and stem != base:
        return stem, 0, base
    return None


def _plain(column: str) -> str:
    return re.sub(r"[ -]+", "_", column.strip().lower())


def _near(column: str, columns: Collection[str]) -> str:
    near = difflib.get_close_matches(column, list(columns), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
