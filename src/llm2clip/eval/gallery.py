"""Images for the page: captions with the five images they find, the worst misses, and pairs that are taken for another.

Letters: N captions, M images.
"""

from __future__ import annotations

import base64
import functools
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.nn.functional import cosine_similarity

from llm2clip.data.bad import BadImage
from llm2clip.data.images import load_image
from llm2clip.data.sample import Sample
from llm2clip.metrics import best_columns, match
from llm2clip.protocols import Encoder
from llm2clip.scores import Captions

BEST = 5
QUERIES = 40
"""Captions shown in all; the page stays below a few megabytes."""
LOOKED_AT = 10_000
"""Captions of a kind among which the worst are sought."""
SIDE, QUALITY = 160, 70
"""Of a thumbnail: longer side in pixels, and of its JPEG."""
LETTERS = 280
"""Shown of a caption."""


@dataclass(frozen=True)
class Query:
    """A caption and what it found.

    Attributes:
        owner: number of its sample.
        rank: of its own image among `pool` images.
        best: numbers of the samples whose images it finds first.
        margin: by how much the first wrong image scores above its own.
    """

    kind: str
    text: str
    owner: int
    rank: int
    pool: int
    best: tuple[int, ...]
    margin: float

    @property
    def wrong(self) -> int | None:
        """The first wrong image."""
        return next((number for number in self.best if number != self.owner), None)


def find_queries(samples: Sequence[Sample], encoder: Encoder, *, seed: int) -> list[Query]:
    """The captions, of many those drawn by the seed, with what each finds among the images that have its kind."""
    readable, images = encoder.images(samples)
    captions = Captions.of(samples[i] for i in readable)
    texts = encoder.texts(captions.texts)
    found = []
    for kind, owners in captions.owners.items():
        pool = np.unique(owners)
        drawn = np.sort(np.random.default_rng(seed).permutation(len(owners))[:LOOKED_AT])
        own, rows = np.array(owners)[drawn], np.array(captions.rows[kind])[drawn]
        ranks = match(texts[rows], images[pool], own, pool, both=False).ranks
        columns, cosines = best_columns(texts[rows], images[pool], BEST)
        right = cosine_similarity(texts[rows].float(), images[own].float(), dim=1).tolist()
        for i, (owner, row) in enumerate(zip(own, rows, strict=True)):
            best = pool[columns[i]]
            rivals = cosines[i][best != owner]
            margin = float(rivals[0]) - right[i] if len(rivals) else -1.0
            numbers = tuple(readable[number] for number in best)
            found.append(Query(kind, captions.texts[row], readable[owner], int(ranks[i]), len(pool), numbers, margin))
    return found


def choose(queries: Sequence[Query], *, seed: int, most: int) -> dict[str, list[Query]]:
    """What is shown: half of `most` drawn by the seed, a quarter the worst misses, a quarter confused pairs.

    An image's captions are shown once in each part; a pair is shown by its clearest caption.
    """
    order = np.random.default_rng(seed).permutation(len(queries))
    misses = sorted((q for q in queries if q.rank > 1), key=lambda q: (-q.rank / q.pool, -q.margin))
    pairs: dict[frozenset[int], list[Query]] = defaultdict(list)
    for query in misses:
        if query.wrong is not None:
            pairs[frozenset((query.owner, query.wrong))].append(query)
    confused = sorted(pairs.values(), key=lambda own: (-len(own), -sum(q.margin for q in own)))
    return {
        "drawn": _one_an_image([queries[i] for i in order], max(1, most // 2)),
        "misses": _one_an_image(misses, max(1, most // 4)),
        "confused": [max(own, key=lambda q: q.margin) for own in confused[: max(1, most // 4)]],
    }


def _one_an_image(queries: Sequence[Query], most: int) -> list[Query]:
    first = {query.owner: query for query in reversed(queries)}
    return [query for query in queries if first[query.owner] is query][:most]


def gallery(samples: Sequence[Sample], encoder: Encoder, *, seed: int, most: int) -> dict[str, list[dict[str, Any]]]:
    """The parts of a dataset's gallery as the page shows them, each query with its images.

    Args:
        samples: of the dataset.
        encoder: holds their vectors.
        seed: of the draw.
        most: queries in all.
    """
    queries = find_queries(samples, encoder, seed=seed)

    @functools.cache
    def shown(number: int) -> str:
        return thumbnail(samples[number])

    def as_shown(query: Query) -> dict[str, Any]:
        wrong = query.wrong
        return {
            "kind": query.kind,
            "text": query.text if len(query.text) <= LETTERS else f"{query.text[:LETTERS]}...",
            "rank": query.rank,
            "pool": query.pool,
            "own": shown(query.owner),
            "best": [{"image": shown(number), "right": number == query.owner} for number in query.best],
            "wrong": shown(wrong) if wrong is not None else "",
        }

    chosen = choose(queries, seed=seed, most=most)
    return {part: [as_shown(query) for query in own] for part, own in chosen.items()}


def thumbnail(sample: Sample) -> str:
    """A sample's image as a small JPEG in a data URL; "" if it is gone meanwhile."""
    try:
        image = load_image(sample.image, min_size=SIDE)
    except BadImage:
        return ""
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
