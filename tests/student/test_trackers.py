"""wandb and trackio are told every setting by its value, and the curves; modules of their names take notes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate.tracking
import pytest

from llm2clip.student.config import StudentConfig
from llm2clip.student.train import train_student

from .banks import image_samples, log, small_run, write_test_bank


class Notes:
    """The config and the run of a tracker's module."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.lines: dict[int, dict[str, Any]] = {}

    def update(self, values: dict[str, Any], **options: Any) -> None:
        self.settings |= values

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        step = len(self.lines) + 1 if step is None else step  # accelerate 1.10 does not tell trackio
        self.lines.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.ended = True


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Notes]:
    """The name of a tracker and what its module was told."""
    notes, module = Notes(), ModuleType(request.param)
    module.__spec__ = importlib.util.spec_from_loader(request.param, None)
    module.init, module.config, module.finish = lambda **options: notes, notes, notes.finish  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, request.param, module)
    kind = accelerate.tracking.LoggerType(request.param)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [kind])
    return request.param, notes


def test_every_setting_and_curve_is_told(tracker: tuple[str, Notes], tiny_tower: Path, tmp_path: Path) -> None:
    name, notes = tracker
    bank = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "images", 12))
    run = small_run(bank.folder, tiny_tower, steps=2, tracker=name, mix={"short": 0.5, "long": 0.5})
    config = StudentConfig(**run, out=tmp_path / "student")
    out = train_student(config)
    plain = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert notes.settings == plain | {
        "out": str(out),
        "bank": json.dumps([str(bank.folder)]),
        "mix": '{"short": 0.5, "long": 0.5}',
        "bank_weights": "[]",
        "inherit_kinds": "[]",
        "inherit_bank": "[]",
        "val": "[]",
    }
    for line in log(out):
        told = notes.lines[line.pop("step")]
        assert {key: pytest.approx(value, rel=1e-6) for key, value in line.items()} == told
    assert sorted(notes.lines) == [1, 2] and notes.ended
