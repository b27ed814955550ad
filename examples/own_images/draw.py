"""Draw images and write their captions as a table: `python draw.py FOLDER [--train 300] [--test 100] [--seed 0]`.

FOLDER gets `train.csv` and `test.csv` (image, short_caption, long_caption) and the images beside them. The scenes are
those of the demo, so nothing is downloaded and nothing has an owner.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # demo/ is not installed

from demo.write import TRAIN_KINDS, captioned

Rows = Callable[[str, int, int], Iterator[tuple[bytes, str, str]]]
"""Of a split, a number and a seed: so many images as PNG, with a short and a long caption."""


def main(rows: Rows, about: str | None) -> None:
    """Write both tables and their images, by what the command line says."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=300, help="images to learn from")
    parser.add_argument("--test", type=int, default=100, help="images to score on")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for split, count in (("train", asked.train), ("test", asked.test)):
        write_table(asked.folder, split, rows(split, count, asked.seed))


def write_table(folder: Path, split: str, rows: Iterator[tuple[bytes, str, str]]) -> None:
    """The images of a split in `folder/split/`, and `folder/split.csv`."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "short_caption", "long_caption"])
        for index, (image, *captions) in enumerate(rows):
            name = f"{split}/{index:04d}.png"
            (folder / name).write_bytes(image)
            table.writerow([name, *captions])


def scenes(split: str, count: int, seed: int) -> Iterator[tuple[bytes, str, str]]:
    """Scenes of the demo."""
    for sample in captioned(split, count, seed=seed, kinds=TRAIN_KINDS):
        yield sample.png(), sample.captions["short"][0], sample.captions["long"][0]


if __name__ == "__main__":
    main(scenes, __doc__)
