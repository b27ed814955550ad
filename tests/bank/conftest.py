"""Samples, a source and small banks for the tests of this folder."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankConfig
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.reader import Bank

WORDS = "a the of red green blue disc square image small large shows one two dark left right on is this".split()
Build = Callable[..., Bank]


def words(number: int, *, count: int) -> str:
    """A caption of `count` words that differs from that of every other `number`."""
    return " ".join(WORDS[(number * 7 + i * (3 + number % 5)) % len(WORDS)] for i in range(count)) + f" {number}"


def write_image(path: Path) -> None:
    """One grey pixel."""
    Image.new("L", (1, 1)).save(path)


def write_table(path: Path, rows: int, *, columns: dict[str, int], first: int = 0) -> Path:
    """A CSV of `rows` images (of one pixel) with a caption of the given number of words in each column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *columns])
        for i in range(first, first + rows):
            write_image(path.parent / f"{i}.jpg")
            writer.writerow([f"{i}.jpg", *(words(i, count=count) for count in columns.values())])
    return path


@pytest.fixture(scope="session")
def write_captions() -> Callable[..., Path]:
    return write_table


@pytest.fixture(scope="session")
def captions_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images with a short and a long caption each; nothing looks at the images."""
    folder = tmp_path_factory.mktemp("captions")
    return write_table(folder / "captions.csv", 60, columns={"short_caption": 4, "long_caption": 14})


@pytest.fixture(scope="session")
def build(tiny_llm: Path) -> Build:
    """Builds a bank with the tiny LLM, in fp32, 16 rows a shard."""

    def build_one(data: Path, out: Path, **settings: Any) -> Bank:
        defaults = {"teacher": str(tiny_llm), "precision": "fp32", "shard_rows": 16, "device": "cpu"}
        build_bank(BankConfig(data=(str(data),), out=out, **{**defaults, **settings}))
        return Bank.open(out)

    return build_one


@pytest.fixture(scope="session")
def bank(captions_csv: Path, build: Build, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A whole bank of `captions_csv`: 60 samples, 120 captions, 8 shards, float16."""
    return build(captions_csv, tmp_path_factory.mktemp("banks") / "bank")


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, by its relative name."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Captions of each call of the encoder."""
    counts: list[int] = []
    run = CaptionEncoder.run

    def counted(self, prepared, sink):
        counts.append(sum(len(batch) for batch in prepared.batches))
        return run(self, prepared, sink)

    monkeypatch.setattr(CaptionEncoder, "run", counted)
    return counts
