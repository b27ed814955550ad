"""Pairs of captions of one image: what the teacher learns to bring together, and what CRA asks for."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

Kinds = tuple[str, str]


def possible_pairs(captions: Mapping[str, Sequence[str]]) -> dict[Kinds, list[tuple[str, str]]]:
    """All pairs of two different captions, by their two kinds in sorted order, in the order of the captions.

    >>> possible_pairs({"short": ["a", "b"], "long": ["A"]})
    {('short', 'short'): [('a', 'b')], ('long', 'short'): [('A', 'a'), ('A', 'b')]}
    """
    flat = [(kind, text) for kind, texts in captions.items() for text in dict.fromkeys(texts)]
    pairs: dict[Kinds, list[tuple[str, str]]] = {}
    for i, first in enumerate(flat):
        for second in flat[i + 1 :]:
            if first[1] != second[1]:
                (kind_a, a), (kind_b, b) = sorted((first, second), key=lambda item: item[0])
                pairs.setdefault((kind_a, kind_b), []).append((a, b))
    return pairs


def draw_pair(
    captions: Mapping[str, Sequence[str]],
    *,
    seed: int,
    sample_id: str,
    epoch: int = 0,
    weights: Mapping[Kinds, float] | None = None,
) -> tuple[str, str] | None:
    """One pair of different captions of an image, drawn anew each epoch; None if it has no two (of allowed kinds).

    The draw is a pure function of `seed`, `epoch` and `sample_id`. Which of the two comes first (the query) is random,
    as in the official training code.

    Args:
        captions: kind -> captions, as in `Sample.captions`.
        weights: kinds in sorted order, such as `("long", "short")` -> relative weight of drawing such a pair; kinds
            left out never pair. Without it every pair is equally likely.

    Example:
        >>> sorted(draw_pair({"short": ["a dog"], "long": ["a brown dog runs"]}, seed=0, sample_id="1"))
        ['a brown dog runs', 'a dog']
    """
    pairs = possible_pairs(captions)
    if weights is not None:
        pairs = {kinds: found for kinds, found in pairs.items() if weights.get(kinds, 0) > 0}
    if not pairs:
        return None
    generator = random.Random(f"{seed}/{epoch}/{sample_id}")
    kinds = list(pairs)
    shares = [len(pairs[k]) if weights is None else weights[k] for k in kinds]
    pair = generator.choice(pairs[generator.choices(kinds, shares)[0]])
    return pair if generator.random() < 0.5 else pair[::-1]
