"""Scenes written in users' formats come back through the ordinary sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demo.images import draw_image
from demo.write import NUM_TARS, TEST_KINDS, TRAIN_KINDS, captioned, columns, write_csv, write_tars
from llm2clip.data.config import SourceConfig
from llm2clip.data.images import load_image
from llm2clip.data.source import open_source


def test_tars_come_back_whole(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "train", 25, seed=3)
    assert len(tars) == NUM_TARS
    read = list(open_source(SourceConfig(data=tuple(map(str, tars)))))
    written = list(captioned("train", 25, seed=3, kinds=TRAIN_KINDS))
    assert [{k: list(v) for k, v in s.captions.items()} for s in read] == [s.captions for s in written]
    for sample, own in zip(read, written, strict=True):
        assert np.array_equal(np.asarray(load_image(sample.image)), draw_image(own.scene, seed=own.seed))


def test_a_csv_comes_back_whole(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "test", 12, seed=0)
    read = list(open_source(SourceConfig(data=(str(path),), captions=columns())))
    written = list(captioned("test", 12, seed=0, kinds=TEST_KINDS))
    assert [{k: list(v) for k, v in s.captions.items()} for s in read] == [s.captions for s in written]


def test_equal_seeds_write_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tars(tmp_path / name, 10, seed=1)
        write_csv(tmp_path / f"{name}-test", "test", 3, seed=1)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    for path in sorted((tmp_path / "one-test").iterdir()):
        assert path.read_bytes() == (tmp_path / "two-test" / path.name).read_bytes()


def test_images_are_small_files() -> None:
    sample = next(captioned("train", 1, seed=0, kinds=("short",)))
    assert len(sample.png()) < 8192 and sample.png().startswith(b"\x89PNG")
