"""Scenes on disk in users' formats: training images as webdataset tars, validation and test as CSV beside PNGs."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from demo.grammar import Claim, Voice, draw_claim, long_english, short_chinese, short_english, short_spanish
from demo.images import draw_image, png_bytes
from demo.scene import Scene, draw_scenes
from llm2clip.progress import track

TRAIN_KINDS = ("short", "long")
TEST_KINDS = ("short", "long", "unseen", "es", "zh")
PER_KIND = 2
"""Captions of each kind an image has."""
SHORT_WORDS = 15
"""Most words of a short caption in known words; longer ones are drawn again."""
NUM_TARS = 10
"""The first of them is the tenth of the pairs that the few-pairs arms train on."""


@dataclass(frozen=True)
class Captioned:
    """A scene, its image's seed, and by kind its captions and what they claim (nothing for long ones)."""

    scene: Scene
    seed: int
    captions: dict[str, list[str]]
    claims: dict[str, list[Claim]]

    def png(self) -> bytes:
        """Its image."""
        return png_bytes(draw_image(self.scene, seed=self.seed))


def captioned(split: str, count: int, *, seed: int, kinds: tuple[str, ...]) -> Iterator[Captioned]:
    """The first `count` scenes of a split with two captions of each kind."""
    random = Random(f"captions/{split}/{seed}")
    seen, unseen = Voice(random), Voice(random, seen=False, unseen=True)
    makers: dict[str, Callable[[Claim], str]] = {
        "short": lambda claim: short_english(claim, seen),
        "unseen": lambda claim: short_english(claim, unseen),
        "es": lambda claim: short_spanish(claim, seen),
        "zh": lambda claim: short_chinese(claim, seen),
    }
    for scene in islice(draw_scenes(split, seed=seed), count):
        captions: dict[str, list[str]] = {}
        claims: dict[str, list[Claim]] = {}
        for kind in kinds:
            said: dict[str, Claim] = {}
            while len(said) < PER_KIND:
                claim = draw_claim(scene, random)
                text = makers[kind](claim) if kind in makers else long_english(scene, seen)
                if kind != "short" or count_words(text) <= SHORT_WORDS:
                    said.setdefault(text, claim)
            captions[kind] = list(said)
            claims[kind] = list(said.values()) if kind in makers else []
        yield Captioned(scene, random.randrange(1 << 30), captions, claims)


def count_words(text: str) -> int:
    """Words of a text, punctuation not counted.

    >>> count_words("on black : a star")
    4
    """
    return len(re.findall(r"\w+", text))


def write_tars(folder: Path, count: int, *, seed: int) -> list[Path]:
    """Training images as img2dataset lays them out: `000001.png` and `000001.json`, in ten tars; returns the tars."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.tar" for number in range(NUM_TARS)]
    samples = track(
        captioned("train", count, seed=seed, kinds=TRAIN_KINDS), description="train", unit="images", total=count
    )
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for index in range(number * count // NUM_TARS, (number + 1) * count // NUM_TARS):
                sample = next(samples)
                record = {f"{kind}_captions": texts for kind, texts in sample.captions.items()}
                _add(tar, f"{index:06d}.png", sample.png())
                _add(tar, f"{index:06d}.json", json.dumps(record).encode())
    return paths


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_csv(folder: Path, split: str, count: int, *, seed: int) -> Path:
    """Images of a split as PNGs beside `captions.csv`, with the columns that `columns` names; returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{kind}_{i}" for kind in TEST_KINDS for i in range(PER_KIND)]
    path = folder / "captions.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", *names])
        samples = captioned(split, count, seed=seed, kinds=TEST_KINDS)
        for index, sample in enumerate(track(samples, description=split, unit="images", total=count)):
            (folder / f"{index:04d}.png").write_bytes(sample.png())
            rows.writerow([f"{index:04d}.png", *(text for kind in TEST_KINDS for text in sample.captions[kind])])
    return path


def columns(kinds: tuple[str, ...] = TEST_KINDS) -> dict[str, str]:
    """The `--captions` mapping of such a CSV: kind -> its columns.

    >>> columns(("short",))
    {'short': 'short_0,short_1'}
    """
    return {kind: ",".join(f"{kind}_{i}" for i in range(PER_KIND)) for kind in kinds}
