"""Which captions the models retrieve for some test images: what the page shows as a gallery."""

from __future__ import annotations

import csv
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from demo.write import TEST_KINDS
from llm2clip.artifacts import write_json

NUM_IMAGES = 10
Arms = Mapping[str, tuple[str, str | None]]
"""Name -> folder of the model and of its teacher, if it has one."""


def make_gallery(folder: Path, arms: Arms, seed: int) -> None:
    """Write `gallery.json`: images drawn by the seed, and for each arm and kind its best caption."""
    test = folder / "data" / "test"
    with (test / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = sorted(Random(f"gallery/{seed}").sample(range(len(rows)), min(NUM_IMAGES, len(rows))))
    entries: list[dict[str, Any]] = [
        {
            "image": b64encode((test / rows[i]["image"]).read_bytes()).decode(),
            "own": {kind: rows[i][f"{kind}_0"] for kind in TEST_KINDS},
            "found": {},
        }
        for i in shown
    ]
    for name, (model, teacher) in arms.items():
        encoder = _open(model, teacher)
        images = encoder.encode_image([test / rows[i]["image"] for i in shown])
        for kind in TEST_KINDS:
            texts = [row[f"{kind}_{n}"] for row in rows for n in (0, 1)]
            best = np.argmax(images @ encoder.encode_text(texts).T, axis=1)
            for entry, index, at in zip(entries, shown, best, strict=True):
                entry["found"].setdefault(kind, {})[name] = {"text": texts[at], "right": bool(at // 2 == index)}
    write_json(folder / "gallery.json", entries)


def _open(model: str, teacher: str | None) -> Any:
    from llm2clip.eval.config import EvaluateConfig
    from llm2clip.eval.models import open_encoder

    config = EvaluateConfig(data=("captions.csv",), out=Path("unused"), model=model, teacher=teacher, precision="fp32")
    return open_encoder(config)[0]
