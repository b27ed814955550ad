"""Scenes: drawn from a seed, each in exactly one split, images that show what the scene says."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from demo.images import SIDE, draw_image, png_bytes
from demo.scene import GRID, SPLITS, Scene, Thing, draw_scenes


def test_splits_share_no_bucket_and_fill_all() -> None:
    buckets = [bucket for split in SPLITS.values() for bucket in split]
    assert sorted(buckets) == list(range(100))


@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_lies_in_its_split_and_is_drawn_by_the_seed(split: str) -> None:
    scenes = list(islice(draw_scenes(split, seed=3), 200))
    assert all(scene.bucket in SPLITS[split] for scene in scenes)
    assert scenes == list(islice(draw_scenes(split, seed=3), 200))
    assert scenes != list(islice(draw_scenes(split, seed=4), 200))


def test_the_split_depends_on_what_is_seen_and_not_on_the_order_it_is_told_in() -> None:
    one, other = Thing("star", "red", "large", "solid", 0, 0), Thing("disc", "blue", "small", "hollow", 3, 2)
    scene = Scene((one, other), "black", "plain")
    assert scene.bucket == replace(scene, things=(other, one)).bucket
    moved = {replace(scene, things=(one, replace(other, column=c))).bucket for c in range(GRID)}
    assert len(moved) > 1


def test_things_neither_share_a_cell_nor_look_alike() -> None:
    for scene in islice(draw_scenes("train", seed=0), 300):
        assert 2 <= len(scene.things) <= 5
        assert len({(t.row, t.column) for t in scene.things}) == len(scene.things)
        assert len({(t.colour, t.shape) for t in scene.things}) == len(scene.things)


def test_a_image_shows_its_things_where_they_are() -> None:
    here = Thing("square", "red", "large", "solid", 0, 0)
    scene = Scene((here, Thing("circle", "blue", "large", "solid", 3, 3)), "black", "plain")
    pixels = np.asarray(draw_image(scene, seed=1), np.int64)
    assert pixels.shape == (SIDE, SIDE, 3)
    cell = SIDE // GRID
    corner, opposite = pixels[:cell, :cell].mean((0, 1)), pixels[-cell:, -cell:].mean((0, 1))
    assert corner[0] > corner[2] + 30 and opposite[2] > opposite[0] + 30
    middle = pixels[cell : 2 * cell, cell : 2 * cell].mean()
    assert middle < corner.max()


@pytest.mark.parametrize(
    "change", [{"size": "small"}, {"fill": "hollow"}, {"fill": "striped"}, {"shape": "heart"}, {"colour": "green"}]
)
def test_every_attribute_can_be_seen(change: dict[str, str]) -> None:
    thing = Thing("square", "red", "large", "solid", 1, 1)
    first, second = (Scene((t,), "grey", "plain") for t in (thing, replace(thing, **change)))
    a, b = (np.asarray(draw_image(scene, seed=7), np.int64) for scene in (first, second))
    assert np.abs(a - b).max() > 40


def test_images_of_one_seed_are_the_same_bytes() -> None:
    scene = next(draw_scenes("test", seed=0))
    assert png_bytes(draw_image(scene, seed=5)) == png_bytes(draw_image(scene, seed=5))
    assert png_bytes(draw_image(scene, seed=5)) != png_bytes(draw_image(scene, seed=6))
