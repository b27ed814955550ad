"""Small banks for tests of what reads them: images of one colour each, vectors that say their row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from llm2clip.bank.build import Plan, write_bank
from llm2clip.bank.collect import Intake
from llm2clip.bank.encoder import Prepared
from llm2clip.bank.load import TeacherFacts
from llm2clip.bank.reader import Bank
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import ImageRef, Sample

DIM = 8


def vector_of(text: str) -> np.ndarray:
    """The vector of a caption in a test bank."""
    return np.random.default_rng(list(text.encode())).normal(size=DIM).astype(np.float16)


class FakeEncoder:
    """In the place of a teacher."""

    cuts = SimpleNamespace(limit=None)
    device = None

    def prepare(self, texts: list[str]) -> Prepared:
        return Prepared([np.arange(len(texts))], np.ones(len(texts), np.int64), None, texts)

    def run(self, prepared: Prepared, sink: Any) -> np.ndarray:
        if prepared.texts:
            sink(prepared.batches[0], (np.stack([vector_of(text) for text in prepared.texts]), None))
        return np.ones(len(prepared.texts), np.int32)


def facts(fingerprint: str = "t" * 16) -> TeacherFacts:
    """Of a teacher that never was."""
    values: dict[str, Any] = {"fingerprint": fingerprint, "dim": DIM, "prompt": ""}
    fields = {name: field.type for name, field in TeacherFacts.__dataclass_fields__.items()}
    return TeacherFacts(**{name: values.get(name, "" if "str" in str(kind) else 0) for name, kind in fields.items()})


def write_test_bank(
    folder: Path, samples: Sequence[Sample] | Iterable[Sample], *, teacher: str = "t" * 16, dtype: str = "float16"
) -> Bank:
    """A whole bank of `samples`."""
    plan = Plan(
        out=folder,
        settings={},
        teacher=facts(teacher),
        encoder=FakeEncoder(),  # type: ignore[arg-type]
        intake=lambda: Intake(samples, "s" * 16, BadSamples(1.0)),
        dtype=dtype,
        shard_rows=16,
    )
    return Bank.open(write_bank(plan))


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a test image."""
    return (3 * number % 256, 7 * number % 256, 200 - number % 100)


def image_samples(folder: Path, count: int, *, name: str = "p") -> list[Sample]:
    """PNG files of one colour each; sample i has one short caption, i % 3 long ones, and every fourth a Chinese one."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(count):
        path = folder / f"{name}{i:03d}.png"
        Image.new("RGB", (40, 30), colour(i)).save(path)
        captions = {"short": (f"{name} {i}",), "long": tuple(f"{name} {i} long {j}" for j in range(i % 3))}
        if i % 4 == 0:
            captions["zh"] = (f"{name} {i} 中文",)
        samples.append(Sample(f"{name}{i}", ImageRef(str(path)), {k: v for k, v in captions.items() if v}))
    return samples


def log(folder: Path) -> list[dict[str, Any]]:
    """What a run says of each step and score."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def small_run(bank: Path, tower: Path, /, **changes: Any) -> dict[str, Any]:
    """Settings of a few steps in this process, in which much is learned."""
    settings: dict[str, Any] = {
        "bank": (str(bank),),
        "tower": str(tower),
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "adaptor_learning_rate": 1e-3,
        "dim": 16,
        "workers": 0,
        "precision": "fp32",
        "tracker": "none",
    }
    return settings | changes
