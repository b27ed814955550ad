"""`scripts/same`: what it compares, and that it names what was changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import same, same_grid  # noqa: E402
from tools.same_compare import Folders, compare_printed, summary  # noqa: E402

FAKE = """
import os, sys, dataclasses, json, pathlib, tyro
@dataclasses.dataclass(frozen=True, kw_only=True)
class Grow:
    out: pathlib.Path
    FLAG: float = 0.5
    kill: bool = False
if "--help" in sys.argv:
    print("usage\\n\\n  grow  makes things grow")
    sys.exit(0)
config = tyro.cli(Grow, args=sys.argv[2:])
if config.kill:
    os._exit(9)
config.out.mkdir(parents=True)
lines = [{"step": 1, "loss": 1.0, "seconds": os.getpid()}, {"step": 2, "loss": 1.0 - config.FLAG * RATE}]
(config.out / "log.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def checkout(tmp_path):
    """Makes a checkout whose llm2clip has one verb."""

    def make(name: str, *, flag: str = "speed", rate: float = 1.0) -> Path:
        package = tmp_path / name / "src" / "llm2clip"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(FAKE.replace("FLAG", flag).replace("RATE", str(rate)))
        return tmp_path / name

    return make


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Compares two such checkouts; returns the exit code and what was printed."""
    because = same_grid.Because("a test")
    monkeypatch.setattr(same_grid, "USUAL", {"grow": ""})
    rows = {"out": because, "speed": ["--speed 0.25", "--speed 0.125"], "kill": "= --kill"}
    monkeypatch.setattr(same_grid, "GRID", {"grow": rows})
    for name in ("EXTRA", "OWN_PROCESS", "ENCODED"):
        monkeypatch.setattr(same_grid, name, {})
    monkeypatch.setattr("tools.same_shared.make_shared", lambda folder: None)

    def compare(old: Path, new: Path, *words: str, out: Path = tmp_path / "out") -> tuple[int, str]:
        if "again" not in out.name:
            shutil.rmtree(out, ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["same", str(old), "--new", str(new), "--out", str(out), *words])
        return same.main(), capsys.readouterr().out

    return compare


def test_a_checkout_is_the_same_as_itself_and_a_row_that_dies_is_named(checkout, run) -> None:
    code, said = run(checkout("a"), checkout("b"))
    assert code == 1 and "4 rows: 3 equal, 1 part" in said and "0 fields wrong" in said
    assert "PARTS  grow/kill" in said and "both fail, so nothing is shown: 9 its process died" in said


def test_it_says_at_which_step_and_by_how_much_they_part(checkout, run) -> None:
    code, said = run(checkout("a"), checkout("b", rate=1.5), "--only", "base")
    assert code == 1 and "log.jsonl step 2/loss: 0.5 | 0.25   (abs 0.25, rel 0.5)" in said and "step 1" not in said


def test_a_row_whose_flag_does_nothing_shows_nothing(checkout, run) -> None:
    code, said = run(checkout("a", rate=0.0), checkout("b", rate=0.0), "--only", "speed")
    assert code == 1 and said.count("effect: none: all is as in grow/base") == 2


def test_renamed_flags_are_asked_for_by_their_own_names(checkout, run, monkeypatch) -> None:
    old, new = checkout("a", flag="pace"), checkout("b")
    said = run(old, new, "--only", "base")[1]
    assert "FIELD  grow pace: gone, and not in REMOVED" in said and "FIELD  grow speed: new, and not in ADDED" in said
    monkeypatch.setattr(same_grid, "RENAMED", {"grow": {"pace": "speed"}})
    assert run(old, new, "--only", "base", "speed")[0] == 0


@pytest.mark.slow
def test_results_of_the_old_code_are_used_again_and_those_of_the_new_are_not(checkout, run, tmp_path) -> None:
    old, new, out = checkout("a"), checkout("b"), tmp_path / "again"
    assert run(old, new, "--only", "base", out=out)[0] == 0
    code = (old / "src" / "llm2clip" / "__main__.py").read_text()
    for side, expected in ((old, 0), (new, 1)):
        (side / "src" / "llm2clip" / "__main__.py").write_text(code.replace("* 1.0", "* 1.5"))
        assert run(old, new, "--only", "base", out=out)[0] == expected
    with pytest.raises(SystemExit):
        run(new, old, out=out)


@pytest.mark.slow
def test_rows_of_flags_that_are_gone_are_not_run(checkout, run, monkeypatch) -> None:
    monkeypatch.setattr(same_grid, "REMOVED", {"grow": {"speed": "a test", "kill": "a test"}})
    code, said = run(checkout("a"), checkout("b"))
    assert code == 0 and said.startswith("1 rows: 1 equal")


def test_every_flag_of_this_code_has_a_row_or_a_reason(tmp_path) -> None:
    fields = same.Side(ROOT, tmp_path, old=False).fields()
    assert fields["train-student"]["steps"] == "None" and fields["bank info"]["bank"] == "required"
    assert same.check_fields(fields, fields) == []


def test_a_changed_default_and_forgotten_fields_are_named(monkeypatch) -> None:
    monkeypatch.setattr(same_grid, "GRID", {"grow": {"a": "--a 1", "b": "--b 1", "z": "--z 1"}})
    old = {"grow": {"a": "1", "b": "2"}, "shrink": {}}
    new = {"grow": {"a": "1", "b": "3", "c": "4"}}
    assert same.check_fields(old, new) == [
        "grow c: no row and no reason in GRID",
        "grow z: a row in GRID, but no such field",
        "grow c: new, and not in ADDED",
        "grow b: the default was 2, is 3",
        "shrink: only in the old code; say why in ADDED or REMOVED",
    ]
    monkeypatch.setattr(same_grid, "ALLOWED", [("grow", "default b", "a test")])
    assert not any("default" in line for line in same.check_fields(old, new))


def test_weights_are_compared_to_the_last_bit(tmp_path) -> None:
    weights = {name: torch.ones(3) for name in "abcde"}
    for side in ("old", "new"):
        (tmp_path / side / "row").mkdir(parents=True)
        save_file(weights, tmp_path / side / "row" / "model.safetensors")
    folders = Folders((tmp_path / "old", tmp_path), (tmp_path / "new", tmp_path))
    assert folders.compare("row", "row", "train-student") == []
    changed = {**weights, "b": torch.tensor([1, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)), 1])}
    changed |= {"c": torch.full((3,), 3.0), "d": torch.ones(2), "e": torch.ones(3, dtype=torch.float64)}
    save_file(changed, tmp_path / "new" / "row" / "model.safetensors")
    parts = folders.compare("row", "row", "train-student")
    assert [part.place for part in parts] == [f"model.safetensors {name}" for name in "bcde"]
    assert parts[0].text == "1 of 3 numbers" and 0 < parts[0].absolute < 2e-7 and parts[1].absolute == 2
    assert parts[2].text == "torch.float32 [3] | torch.float32 [2]" and "float64" in parts[3].text
    assert "4 places in all; largest abs 2 (model.safetensors c)" in summary(parts)


def test_names_of_folders_and_times_do_not_count_but_all_else_does(tmp_path, monkeypatch) -> None:
    for side, seconds, name in (("old", 1.0, "pictures"), ("new", 2.0, "images")):
        folder = tmp_path / side / "row"
        folder.mkdir(parents=True)
        manifest = {"config": {"out": str(folder), "gone": 1} if side == "old" else {"out": str(folder)}}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "seconds": seconds, name: 3}))
    monkeypatch.setattr(same_grid, "REMOVED", {"grow": {"gone": "a test"}})
    monkeypatch.setattr(same_grid, "RENAMED_OUTPUT", {})
    folders = Folders((tmp_path / "old", tmp_path / "x"), (tmp_path / "new", tmp_path / "x"))
    places = [part.place for part in folders.compare("row", "row", "grow")]
    assert places == ["manifest.json pictures", "manifest.json images"]
    monkeypatch.setattr(same_grid, "RENAMED_OUTPUT", {"pictures": "images"})
    assert folders.compare("row", "row", "grow") == []
    (tmp_path / "new" / "row" / "more.txt").write_text("")
    assert [part.text for part in folders.compare("row", "row", "grow")] == ["only in the new"]
    assert list(compare_printed("read 3 in 2.5 s, 10/s", "read 3 in 9 s, 99/s", "grow")) == []
    assert [part.place for part in compare_printed("a\nread 3", "a\nread 4", "grow")] == ["stdout line 1"]


WRONG = {
    "schedule": (
        "student/optim.py",
        "math.cos(math.pi * min(1.0, progress))",
        "math.cos(math.pi * min(1.0, progress + 1 / max(1, total_steps)))",
        ["train-student/base"],
        ["PARTS  train-student/base\n", "log.jsonl step 2/loss", "model.safetensors"],
    ),
    "lost flag": (
        "student/session.py",
        "weight_decay=config.weight_decay,",
        "weight_decay=0.05,",
        ["train-student/base", "train-student/weight-decay=0.5"],
        ["PARTS  train-student/weight-decay=0.5\n", "1 part ("],
    ),
    "changed default": (
        "teacher/config.py",
        "scale: float = 50.0",
        "scale: float = 20.0",
        ["train-teacher/base", "train-teacher/scale=5"],
        ["FIELD  train-teacher scale: the default was 50.0, is 20.0", "PARTS  train-teacher/base\n", "1 part ("],
    ),
    "average not saved": (
        "student/session.py",
        "with self._averaged():\n                return self._weights()",
        "with contextlib.nullcontext():\n                return self._weights()",
        ["train-student/base", "train-student/ema=0.5"],
        ["PARTS  train-student/ema=0.5\n", "model.safetensors", "1 part ("],
    ),
    "initialisation": (
        "student/model.py",
        "bound = 1 / math.sqrt(module.in_features)",
        "bound = 0.9 / math.sqrt(module.in_features)",
        ["train-student/steps=1+"],
        ["PARTS  train-student/steps=1+", "model.safetensors adaptor.blocks.0.expand.weight", "largest abs"],
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The results of this code, made once."""
    return tmp_path_factory.mktemp("same") / "out"


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_copy_of_this_code_is_named(name, tmp_path, results) -> None:
    file, right, wrong, only, expected = WRONG[name]
    shutil.copytree(ROOT / "src", tmp_path / "src")
    path = tmp_path / "src" / "llm2clip" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    command = [sys.executable, "-m", "tools.same", str(ROOT), "--new", str(tmp_path), "--out", str(results)]
    done = subprocess.run([*command, "--only", *only], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    for words in expected:
        assert words in done.stdout
    if name == "average not saved":
        assert "log.jsonl" not in done.stdout
    if name == "initialisation":
        parted = json.loads((results / "same.json").read_text())["parted"]
        start = next(parts for row, parts in parted.items() if row.startswith("train-student/steps=1+"))
        tensors = [part["place"] for part in start if ".safetensors" in part["place"]]
        assert tensors and all(" adaptor." in place for place in tensors)
