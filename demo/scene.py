"""Scenes: what is in an image, as plain numbers and names; drawn from a seed, each in exactly one split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "crescent")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "white")
SIZES = ("large", "small")
FILLS = ("solid", "hollow", "striped")
GROUNDS = ("black", "grey", "brown", "teal")
TEXTURES = ("plain", "dotted", "checked")
GRID = 4
"""Cells a side; an object fills at most its cell."""

SPLITS = {
    "text": range(30),
    "clip": range(30, 60),
    "train": range(60, 90),
    "val": range(90, 95),
    "test": range(95, 100),
}
"""Which hash buckets (of 100) each split draws from: text is what the mini LLM reads, clip what the mini CLIP sees."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    fill: str
    row: int
    column: int

    @property
    def key(self) -> tuple[str, ...]:
        """Everything that is told of it but where it is."""
        return (self.size, self.fill, self.colour, self.shape)


@dataclass(frozen=True, slots=True)
class Scene:
    """Two to five things on a background. The first two are the salient ones that short captions tell of."""

    things: tuple[Thing, ...]
    ground: str
    texture: str

    @property
    def bucket(self) -> int:
        """A number in 0..99 from what the scene shows, whatever the order of its things; it decides the split."""
        content = (sorted((*t.key, t.row, t.column) for t in self.things), self.ground, self.texture)
        return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=4).digest(), "big") % 100


def draw_scene(random: Random) -> Scene:
    """A scene with no two things in one cell and no two of one colour and shape."""
    count = random.choice((2, 3, 3, 4, 4, 5))
    cells = random.sample(range(GRID * GRID), count)
    looks = random.sample(range(len(SHAPES) * len(COLOURS)), count)
    things = tuple(
        Thing(
            SHAPES[look % len(SHAPES)],
            COLOURS[look // len(SHAPES)],
            random.choice(SIZES),
            random.choice(FILLS),
            *divmod(cell, GRID),
        )
        for cell, look in zip(cells, looks, strict=True)
    )
    return Scene(things, random.choice(GROUNDS), random.choice(TEXTURES))


def draw_scenes(split: str, *, seed: int) -> Iterator[Scene]:
    """Scenes of one split without end; scenes of two splits are never equal, because their buckets differ."""
    random = Random(f"scenes/{split}/{seed}")
    buckets = SPLITS[split]
    while True:
        scene = draw_scene(random)
        if scene.bucket in buckets:
            yield scene
