"""Scenes as 64-pixel images: each thing in its cell of a 4 x 4 grid, on a plain, dotted or checked background."""

from __future__ import annotations

import io
import math
from random import Random

from PIL import Image, ImageChops, ImageDraw

from demo.scene import GRID, Scene, Thing

SIDE = 64
"""Pixels a side."""
SCALE = 4
"""Shapes are drawn this much larger and then shrunk, for smooth edges."""
CELL = SIDE // GRID
COLOURS = {
    "red": (224, 32, 36),
    "green": (40, 190, 60),
    "blue": (46, 84, 235),
    "yellow": (245, 222, 40),
    "purple": (140, 50, 190),
    "orange": (250, 135, 20),
    "pink": (255, 150, 200),
    "white": (250, 250, 250),
}
GROUNDS = {"black": (16, 16, 18), "grey": (125, 127, 130), "brown": (104, 66, 34), "teal": (10, 100, 105)}
REACH = {"large": 0.47, "small": 0.33}
"""Half the width of a thing, in cells."""


def draw_image(scene: Scene, *, seed: int) -> Image.Image:
    """The image of a scene: RGB, 64 x 64. `seed` moves the things by a pixel or so and shifts their colours."""
    random = Random(f"picture/{seed}")
    image = _background(scene)
    for thing in scene.things:
        centre = [CELL * (cell + 0.5) + random.uniform(-1, 1) for cell in (thing.column, thing.row)]
        colour = tuple(max(0, min(255, value + random.randint(-12, 12))) for value in COLOURS[thing.colour])
        mask = _mask(thing, centre, jitter=random.uniform(0.94, 1.04))
        image.paste(Image.new("RGB", image.size, colour), mask=mask)
    return image


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _background(scene: Scene) -> Image.Image:
    ground = GROUNDS[scene.ground]
    image = Image.new("RGB", (SIDE, SIDE), ground)
    draw = ImageDraw.Draw(image)
    marks = tuple(value + 34 if value < 110 else value - 34 for value in ground)
    if scene.texture == "dotted":
        draw.point([(x, y) for x in range(1, SIDE, 4) for y in range(1, SIDE, 4)], fill=marks)
    elif scene.texture == "checked":
        for at in range(3, SIDE, 8):
            draw.line((at, 0, at, SIDE), fill=marks)
            draw.line((0, at, SIDE, at), fill=marks)
    return image


def _mask(thing: Thing, centre: list[float], *, jitter: float) -> Image.Image:
    """Where the thing's paint goes, as greys `[64, 64]`."""
    big = Image.new("L", (SIDE * SCALE, SIDE * SCALE), 0)
    x, y = (value * SCALE for value in centre)
    reach = REACH[thing.size] * CELL * SCALE * jitter
    _shape(ImageDraw.Draw(big), thing.shape, x, y, reach)
    if thing.fill == "hollow":
        hole = Image.new("L", big.size, 0)
        _shape(ImageDraw.Draw(hole), thing.shape, x, y, reach * 0.55)
        big = ImageChops.subtract(big, hole)
    elif thing.fill == "striped":
        stripes = Image.new("L", big.size, 0)
        draw = ImageDraw.Draw(stripes)
        for top in range(0, big.size[1], 3 * SCALE):
            draw.rectangle((0, top, big.size[0], top + 1.5 * SCALE), fill=255)
        big = ImageChops.multiply(big, stripes)
    return big.resize((SIDE, SIDE), Image.Resampling.BOX)


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    """Paint one shape of half-width `r` around `(x, y)`, white on black."""
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=255)
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=255)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=255)
    elif shape == "heart":
        draw.ellipse((x - r, y - r, x + 0.08 * r, y + 0.1 * r), fill=255)
        draw.ellipse((x - 0.08 * r, y - r, x + r, y + 0.1 * r), fill=255)
        draw.polygon([(x - 0.95 * r, y - 0.2 * r), (x + 0.95 * r, y - 0.2 * r), (x, y + r)], fill=255)
    elif shape == "crescent":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        draw.ellipse((x - 0.25 * r, y - 1.05 * r, x + 1.6 * r, y + 0.8 * r), fill=0)
    else:
        draw.polygon([(x + dx * r, y + dy * r) for dx, dy in _CORNERS[shape]], fill=255)


def _star() -> list[tuple[float, float]]:
    turns = [(math.pi * i / 5, 1.05 if i % 2 == 0 else 0.42) for i in range(10)]
    return [(length * math.sin(turn), -length * math.cos(turn)) for turn, length in turns]


_CORNERS = {
    "triangle": [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)],
    "diamond": [(0.0, -1.05), (0.75, 0.0), (0.0, 1.05), (-0.75, 0.0)],
    "star": _star(),
}
