"""The protocol card of a named benchmark: what is scored, how, and where its files come from."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip.config import to_dict
from llm2clip.errors import setting

PUBLISHED = Path(__file__).parent / "published.tsv"
INNER = ("folders", "cra", "downloads", "variant_of")
"""Fields that are nothing of the protocol."""
TIES = "a tie counts against the model (cosines within 1e-6)"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What must be known of a benchmark to quote its score.

    Attributes:
        title: what it is.
        split: which part of the data.
        per_image: how many captions an image has, and which count.
        text: what is done to a caption before the model reads it.
        source: whose files, and whose protocol.
        licence: of images and captions.
        fetch: what must lie in its folder, and where it comes from.
        folders: where below it the images are looked for, beside the folder itself.
        images: how many there are; a score on fewer is refused. None where that is not known.
        captions: how many there are, by language where there are such; likewise.
        notes: what else one should know.
        cra: whether captions are also sought among captions.
        downloads: plain addresses of all its files, where the licence lets anyone fetch them.
        variant_of: the benchmark whose files it reads, too; below `--root` that one's folder serves both.
    """

    title: str
    split: str
    per_image: str
    text: str = "as it stands, without the blanks around it"
    source: str
    licence: str
    fetch: tuple[str, ...]
    folders: tuple[str, ...] = ()
    images: int | None
    captions: int | Mapping[str, int] | None
    notes: tuple[str, ...] = ()
    cra: bool = False
    downloads: tuple[str, ...] = ()
    variant_of: str = ""

    def told(self) -> dict[str, Any]:
        """What a report says of the protocol, JSON-ready."""
        return {
            **{name: value for name, value in to_dict(self).items() if name not in INNER},
            "ties": TIES,
        }


def described(name: str, card: Card) -> Iterator[str]:
    """The lines of a card, for people."""
    yield f"{name}: {card.title}"
    captions = card.captions if isinstance(card.captions, int) or card.captions is None else sum(card.captions.values())
    for label, value in (
        ("split", card.split),
        ("images", known(card.images)),
        ("captions", card.per_image if card.captions == {} else f"{known(captions)}; {card.per_image}"),
        ("text", card.text),
        ("ties", TIES),
        ("source", card.source),
        ("licence", card.licence),
        *(("fetch", line) for line in card.fetch),
        *([("fetch", f"or give {setting('download')}")] if card.downloads else []),
        *(("note", line) for line in card.notes),
        *(("published", row.told()) for row in published(name)),
    ):
        yield f"  {label:<10}{value}"


def known(count: int | None) -> str:
    """A count that is enforced, or that it is not known.

    >>> known(25010), known(None)
    ('25,010', 'not known: what is found is counted, not checked')
    """
    return "not known: what is found is counted, not checked" if count is None else f"{count:,}"


class Published(NamedTuple):
    """A score that somebody printed, in per cent."""

    source: str
    model: str
    i2t: float
    t2i: float | None

    def told(self) -> str:
        """It in a line.

        >>> Published("a paper", "CLIP", 58.0, 37.1).told(), Published("a paper", "CLIP", 76.6, None).told()
        ('58.0 / 37.1  CLIP (a paper)', '76.6  CLIP (a paper)')
        """
        value = f"{self.i2t}" if self.t2i is None else f"{self.i2t} / {self.t2i}"
        return f"{value}  {self.model} ({self.source})"


@functools.lru_cache
def published_table() -> tuple[dict[str, str], ...]:
    """The printed scores, a row a model; R@1 image to text / text to image, or top-1."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file, delimiter="\t"))


def published(name: str) -> list[Published]:
    """What is printed for a benchmark under its protocol.

    >>> published("urban1k")[-1].model, published("urban1k")[-1].t2i
    ('VLM2Vec (7B) 1344', 92.0)
    """
    rows = [(row, numbers(row[name])) for row in published_table() if row.get(name)]
    return [Published(row["source"], row["model"], *both) for row, both in rows]


def numbers(cell: str) -> tuple[float, float | None]:
    """The numbers of a cell of the table.

    >>> numbers("58.0/37.1"), numbers("76.6")
    ((58.0, 37.1), (76.6, None))
    """
    first, _, second = cell.partition("/")
    return float(first), float(second) if second else None
