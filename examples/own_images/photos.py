"""Real images with captions, in tables as of draw.py.

`python -m examples.own_images.photos FOLDER [--train 300] [--test 100] [--seed 0]`, from the root of the repository.

Squares cut out of the two photographs that come with scikit-learn, those to score on out of the middle third, the
others out of the first and last. A caption says which colours lie where, counted in the pixels, in words that the
mini models read.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from demo.images import COLOURS, GROUNDS, png_bytes
from examples.own_images.draw import main

SIDES = (48, 150)
"""Pixels a side of a square, drawn from this range."""
THIRDS = {"train": (0, 2), "test": (1,)}
"""Those of a photograph's width that a split has."""
NAMES, VALUES = zip(*{**COLOURS, **GROUNDS}.items(), strict=True)
PLACES = ("top left", "top right", "bottom left", "bottom right")


def squares(split: str, count: int, seed: int) -> Iterator[tuple[bytes, str, str]]:
    """Squares of a split, as PNG, with their captions."""
    random = Random(f"photos/{split}/{seed}")
    for _ in range(count):
        pixels = cut_out(random, split)
        yield png_bytes(Image.fromarray(pixels)), *captions(pixels, random)


def cut_out(random: Random, split: str) -> NDArray[np.uint8]:
    """A square [side, side, 3] of one of the photographs, of the part that a split has."""
    photo = random.choice(load_sample_images().images)
    width, side = photo.shape[1] // 3, random.randint(*SIDES)
    left = random.choice(THIRDS[split]) * width + random.randint(0, width - side)
    top = random.randint(0, len(photo) - side)
    return photo[top : top + side, left : left + side]


def captions(pixels: NDArray[np.uint8], random: Random) -> tuple[str, str]:
    """A short caption, of two quarters of an image, and a long one, of all four with the next colour of each."""
    colours = quarters(pixels)
    one, other = random.sample(range(len(PLACES)), 2)
    short = f"the {PLACES[one]} is {colours[one][0]} and the {PLACES[other]} is {colours[other][0]}"
    said = [f"the {place} is {' and '.join(found)}" for place, found in zip(PLACES, colours, strict=True)]
    return short, " . ".join(said) + " ."


def quarters(pixels: NDArray[np.uint8]) -> list[list[str]]:
    """Of each quarter of an image [side, side, 3] the two colours that most of its pixels are nearest to."""
    distance = ((pixels[:, :, None].astype(float) - np.array(VALUES)) ** 2).sum(3)
    nearest, half = distance.argmin(2), len(pixels) // 2
    parts = (nearest[rows, columns] for rows in half_of(half) for columns in half_of(half))
    counts = (np.bincount(part.ravel(), minlength=len(NAMES)) for part in parts)
    return [[NAMES[colour] for colour in count.argsort(kind="stable")[::-1][:2]] for count in counts]


def half_of(middle: int) -> tuple[slice, slice]:
    """The first and the second half of an axis."""
    return slice(middle), slice(middle, None)


if __name__ == "__main__":
    main(squares, __doc__)
