"""The examples run, and are the commands that README.md gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.own_images.photos import quarters
from llm2clip.artifacts import read_json

ROOT = Path(__file__).parent.parent
RUN = ROOT / "examples" / "own_images" / "run.sh"


def commands(text: str) -> list[tuple[str, dict[str, str]]]:
    """Verbs with the files and folders their flags name, of lines such as `llm2clip VERB --flag value`."""
    lines = re.findall(r"^(?:llm2clip|run) +([a-z-]+) +(--.*)$", text, flags=re.MULTILINE)
    return [(verb, dict(re.findall(r"--([a-z-]+) +(\S+)", flags))) for verb, flags in lines]


def test_own_images_are_readmes_five_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(part for part in re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL) if "build-bank" in part)
    told, run = commands(block), commands(RUN.read_text(encoding="utf-8"))
    assert [verb for verb, _ in told] == [verb for verb, _ in run] and len(run) == 5
    hub = ("Qwen/", "openai/")  # there the example has the demo's models
    for (verb, flags), (_, ours) in zip(told, run, strict=True):
        assert {k: v for k, v in flags.items() if not v.startswith(hub)}.items() <= ours.items(), verb
        assert flags.keys() <= ours.keys(), verb


@pytest.mark.slow
def test_own_images_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [str(RUN), str(tmp_path / "out"), "64", "1"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "out" / "train").glob("*.png"))) == 64
    report = read_json(tmp_path / "out" / "scores" / "report.json")
    assert report["datasets"]["test"]["images"] == 100 and (tmp_path / "out" / "bundle" / "modules.json").exists()


def test_real_images_are_written_and_say_their_colours(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "examples.own_images.photos", str(tmp_path), "--train", "3", "--test", "2"]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT)
    lines = (tmp_path / "test.csv").read_text().splitlines()
    assert lines[0] == "image,short_caption,long_caption" and len(lines) == 3
    assert all(len(list((tmp_path / split).iterdir())) == count for split, count in (("train", 3), ("test", 2)))
    red_over_black = np.zeros((8, 8, 3), np.uint8)
    red_over_black[:4] = (224, 32, 36)
    assert [first for first, _ in quarters(red_over_black)] == ["red", "red", "black", "black"]
