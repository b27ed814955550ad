"""examples/llava/two_arms.py: what is mistyped is told before anything is made or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.llava import two_arms
from examples.llava.two_arms import ArmsConfig, compare
from llm2clip.errors import UsageError


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tests": {"pope": ("pope", Path("typo.json"), Path())}}, "typo.json is no file"),
        ({"captions": (Path("captions.jsn"), Path())}, "captions.jsn is no file"),
        ({"arms": {"blind": "tower"}}, "blind is the arm without images"),
        ({"stage_1": {"micro-batch": 8}}, "stage_1 'micro_batch' is unknown"),
        ({"stage_2": {"epochs": -1}}, "epochs"),
        ({"tests": {"pope": ("popes", Path("a.json"), Path())}}, "popes is none of"),
    ],
)
def test_mistakes_are_told_first(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_arms, "run_arm", lambda *_, **__: pytest.fail("something was made"))
    file = tmp_path / "a.json"
    file.write_text("[]")
    right = {"arms": {"a": "tower"}, "captions": (file, tmp_path), "instructions": (file, tmp_path)}
    settings = {**right, "tests": {"pope": ("pope", file, tmp_path)}, "llm": "llm", "out": tmp_path / "out", **changes}
    with pytest.raises(UsageError, match=said):
        compare(ArmsConfig(**settings))
