"""Benchmarks by their names: files of `eval/benchmarks/`, opened and held against their cards before a model is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm2clip.artifacts import fingerprint
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import SourceError
from llm2clip.eval import benchmarks
from llm2clip.eval.annotations import Row
from llm2clip.eval.card import Card, described, published
from llm2clip.eval.classification import ONE, Labelled, ZeroShot
from llm2clip.eval.places import Images, Place
from llm2clip.eval.retrieval import NamedRetrieval
from llm2clip.parts import find_part, part_names
from llm2clip.protocols import Evaluator
from llm2clip.scores import CaptionRetrieval


def card_of(name: str) -> Card:
    """The card of a benchmark."""
    card: Card = find_part(benchmarks, name, "CARD")
    return card


def told(names: Sequence[str]) -> Iterator[str]:
    """The lines of these benchmarks' cards; without names a line for each there is."""
    if not names:
        width = max(map(len, part_names(benchmarks)))
        for name in part_names(benchmarks):
            yield f"{name:<{width}}  {card_of(name).title}"
    for name in names:
        yield from described(name, card_of(name))


class NoneBad(BadSamples):
    """Of a benchmark every image must be read: a score on a part is no score of it."""

    def __init__(self, name: str) -> None:
        super().__init__(0.0, quiet=True)
        self.name = name

    def add(self, sample_id: str, cause: str, detail: str = "") -> None:
        """Stop.

        Raises:
            SourceError: naming the image.
        """
        raise SourceError(
            f"{self.name}: {sample_id}: {cause}{detail and f': {detail}'}; every image of a benchmark must be there"
        )


class Named:
    """A benchmark as samples, all there and as many as its card says; iterating again gives the same.

    Args:
        name: its name.
        root: its folder, or the one that holds it under its name.
        images: whether images are needed.

    Raises:
        UsageError: if its files are not there.
        SourceError: if they are damaged, or not those of the protocol.
    """

    def __init__(self, name: str, root: str | Path, *, images: bool = True) -> None:
        self.name, self.card, self.bad = name, card_of(name), NoneBad(name)
        place = Place(root, name, self.card.fetch, variant_of=self.card.variant_of)
        self._notes = place.notes
        found = find_part(benchmarks, name, "read")(place)
        self._labelled = found if isinstance(found, Labelled) else None
        rows: list[Row] = list(found.rows if isinstance(found, Labelled) else found)
        self._check(rows)
        refs = _located(rows, Images(place, self.card.folders), place) if images else _unlooked(rows)
        self._samples = [
            Sample(one.image if isinstance(one.image, str) else one.where, ref, one.captions)
            for one, ref in zip(rows, refs, strict=True)
        ]
        self._retrieval = NamedRetrieval(self._samples)
        self._zero_shot = ZeroShot(self._samples, found) if isinstance(found, Labelled) else None
        # an image without a name is known by its place in the benchmark's folder, in a tar also by its length
        names = [one.image if isinstance(one.image, str) else [one.where, one.image.length] for one in rows]
        labels = [] if self._labelled is None else [list(self._labelled.labels), list(self._labelled.names)]
        self.fingerprint = fingerprint(
            [*([n, dict(one.captions)] for n, one in zip(names, rows, strict=True)), *labels]
        )

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def counts(self) -> dict[str, int]:
        """How many captions each part has."""
        counts = Counter[str]()
        for sample in self._samples:
            counts.update({part: len(own) for part, own in sample.captions.items()})
        return dict(counts)

    def shown(self) -> list[Sample]:
        """The samples with the captions of one part alone, English where there is such: what a page shows."""
        parts = list(self.counts)
        if not parts:
            return []
        part = "en" if "en" in parts else parts[0]
        return [replace(sample, captions={part: sample.captions[part]}) for sample in self._samples]

    def evaluators(self, *, images: bool) -> list[Evaluator]:
        """What its protocol asks of a model; of one that sees no images what can be asked."""
        scored: list[Evaluator] = [self._zero_shot or self._retrieval] if images else []
        return [*scored, *([CaptionRetrieval(self._samples)] if self.card.cra else [])]

    def texts(self) -> list[str]:
        """Every text that its evaluators ask a model for, once."""
        found = [text for sample in self._samples for own in sample.captions.values() for text in own]
        if self._zero_shot is not None:
            found += self._zero_shot.sentences((*self._zero_shot.found.templates, *ONE))
        return list(dict.fromkeys(found))

    def facts(self) -> dict[str, Any]:
        """What is no score, of the model that was scored last: median ranks, or the classes and those it confuses."""
        if self._zero_shot is None:
            chart = {"by_length": self._retrieval.by_length} if self._retrieval.by_length else {}
            return {"median_rank": dict(self._retrieval.median_ranks), **chart}
        found = self._zero_shot.found
        return {
            "classes": len(found.names),
            "templates": list(found.templates),
            "confused": [list(pair) for pair in self._zero_shot.confused],
        }

    def told(self) -> dict[str, Any]:
        """What a report says of it: the card, what is not known of it, and what others printed."""
        unknown = [what for what in ("images", "captions") if getattr(self.card, what) is None]
        rows = [row._asdict() for row in published(self.name)]
        return {**self.card.told(), "not_checked": unknown, "found": self._notes, "published": rows}

    def _check(self, rows: Sequence[Row]) -> None:
        named = re.split(r" (?:row|line|image) |: ", rows[0].where)[0] if rows and not self._labelled else "its folder"
        what = f"{self.name}: {named}"
        if self.card.images not in (None, len(rows)):
            raise SourceError(
                f"{what} gives {len(rows):,} images, the protocol has {self.card.images:,} ({self.card.split}); it is "
                "another split or not whole"
            )
        found = Counter[str]()
        for one in rows:
            found.update({part: len(own) for part, own in one.captions.items()})
        wanted = self.card.captions
        for part, count in {"": wanted}.items() if isinstance(wanted, int) else (wanted or {}).items():
            if found[part] != count:
                of = f"{part} " if part else ""
                raise SourceError(
                    f"{what} gives {found[part]:,} {of}captions, the protocol has {count:,}; it is another file, or a "
                    "changed one"
                )
        twice = next((one for one, count in Counter(one.image for one in rows).items() if count > 1), None)
        if twice is not None:
            raise SourceError(f"{what}: image {twice} stands in several rows; fetch the file again")


def _unlooked(rows: Sequence[Row]) -> list[ImageRef]:
    """Places of images that nobody will look at."""
    return [one.image if isinstance(one.image, ImageRef) else ImageRef(one.image) for one in rows]


def _located(rows: Sequence[Row], images: Images, place: Place) -> list[ImageRef]:
    """Where each row's image lies.

    Raises:
        SourceError: naming the first that is not there.
    """
    found = [one.image if isinstance(one.image, ImageRef) else images.find(one.image) for one in rows]
    missing = [one for one, ref in zip(rows, found, strict=True) if ref is None]
    if missing:
        raise SourceError(
            f"{place.name}: image {missing[0].image} ({missing[0].where}) is missing, and {len(missing) - 1:,} more of "
            f"{len(rows):,}; looked in {images.looked_in()}"
        )
    return [ref for ref in found if ref is not None]
