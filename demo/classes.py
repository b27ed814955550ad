"""Scenes of one thing, for zero-shot classification by shape, by colour and by both: what a CLIP may forget."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random

from demo.images import draw_image, png_bytes
from demo.scene import COLOURS, FILLS, GRID, GROUNDS, SHAPES, SIZES, SPLITS, TEXTURES, Scene, Thing

SETS = ("shape", "colour", "both")


def write_classes(folder: Path, split: str, *, per_class: int, seed: int) -> None:
    """The same images as three sets of class folders with their sentences, as `evaluate` reads them.

    Args:
        per_class: images of each colour and shape.
    """
    random = Random(f"classes/{split}/{seed}")
    for colour, shape in product(COLOURS, SHAPES):
        for number in range(per_class):
            image = png_bytes(draw_image(draw_alone(colour, shape, split, random), seed=random.randrange(1 << 30)))
            for kind, name in zip(SETS, (shape, colour, f"{colour}_{shape}"), strict=True):
                place = folder / kind / name
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{colour}-{shape}-{number}.png").write_bytes(image)
    for kind in SETS:
        (folder / kind / "zeroshot_classification_templates.txt").write_text("\n".join(sentences(kind)) + "\n")


def draw_alone(colour: str, shape: str, split: str, random: Random) -> Scene:
    """A scene of this split with one thing of this colour and shape."""
    while True:
        row, column = random.randrange(GRID), random.randrange(GRID)
        thing = Thing(shape, colour, random.choice(SIZES), random.choice(FILLS), row, column)
        scene = Scene((thing,), random.choice(GROUNDS), random.choice(TEXTURES))
        if scene.bucket in SPLITS[split]:
            return scene


def sentences(kind: str) -> list[str]:
    """Sentences around a class's name: what is asked for stands for {c}, the rest is every size, fill or other half.

    >>> sentences("both")[0], sentences("colour")[0], sentences("shape")[0]
    ('a large solid {c}', 'a large {c} circle', 'a large red {c}')
    """
    if kind == "both":
        return [f"a {size} {fill} {{c}}" for size, fill in product(SIZES, FILLS)]
    if kind == "colour":
        return [f"a {size} {{c}} {shape}" for size, shape in product(SIZES, SHAPES)]
    return [f"a {size} {colour} {{c}}" for size, colour in product(SIZES, COLOURS)]
