"""The laboratory: which jobs an arm needs, what its table says, and a quick run whose rows stay when others come."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from demo.classes import SETS, draw_alone, sentences, write_classes
from demo.config import BUDGETS
from demo.lab import ARMS, CHOSEN, CONTROL, PRETRAINED, VIEWS, Lab, table
from demo.results import CLASSES, COLUMNS
from demo.scene import SPLITS
from llm2clip.artifacts import write_json
from llm2clip.data.views import views_of
from llm2clip.errors import UsageError

ROOT = Path(__file__).parents[2]


def run_of(score: float, classes: float = 0.5, **told: float) -> dict[str, object]:
    return {**told, "scores": {**dict.fromkeys(COLUMNS, score), **dict.fromkeys(CLASSES, classes)}}


def test_the_table_has_means_spreads_and_gaps_seed_by_seed() -> None:
    found = {
        CONTROL: [run_of(0.2), run_of(0.4)],
        "other": [run_of(0.3, 0.25, step_ms=7.0), run_of(0.6, 0.75, step_ms=9.0)],
    }
    _, _, control, other = table(found).splitlines()
    assert control.startswith("| control | 30.0 ± 14.1 / 30.0 ± 14.1 |")
    cells = [cell.strip() for cell in other.strip("|").split("|")]
    assert cells[6] == "45.0 ± 21.2" and cells[7] == "+15.0 ± 7.1"  # gaps 10 and 20
    assert cells[8:12] == ["50.0 ± 35.4"] * 3 + ["8"] and cells[12:] == ["", ""]


def test_an_arm_needs_its_teachers_and_banks_before_it(tmp_path: Path) -> None:
    jobs = Lab(tmp_path, "val", "all", BUDGETS["quick"]).jobs(ARMS, 3)
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    for index, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:index])
    assert {f"3 {name}" for name in (*ARMS, PRETRAINED)} <= set(names)


def test_an_arm_with_views_has_a_bank_of_its_own_that_has_its_kinds(tmp_path: Path) -> None:
    lab, arm = Lab(tmp_path, "val", "all", BUDGETS["quick"]), ARMS[f"{CHOSEN}, views"]
    banks = [lab.bank(3, *bank) for bank in arm.banks()]
    assert [bank.name for bank in banks] == ["lora-float16-views-all", "lora-float16-texts-all"]
    assert [lab.bank(3, *bank).name for bank in ARMS[CHOSEN].banks()] == ["D-all", "lora-float16-texts-all"]
    mix, plain = arm.settings["mix"], ARMS[CHOSEN].settings["mix"]
    assert set(mix) - set(plain) == {made for _, _, made in views_of(VIEWS)} and mix["short"] == plain["short"]
    assert sum(mix.values()) == pytest.approx(sum(plain.values()))


def test_scenes_of_one_thing_are_of_their_split_and_class(tmp_path: Path) -> None:
    random = Random(0)
    for split in ("val", "test"):
        scene = draw_alone("red", "star", split, random)
        (thing,) = scene.things
        assert (thing.colour, thing.shape) == ("red", "star") and scene.bucket in SPLITS[split]
    write_classes(tmp_path, "val", per_class=1, seed=0)
    counts = {kind: {path.parent.name for path in (tmp_path / kind).glob("*/*.png")} for kind in SETS}
    assert [len(counts[kind]) for kind in SETS] == [8, 8, 64] and "red_star" in counts["both"]
    assert all(len(list((tmp_path / kind).glob("*/*.png"))) == 64 for kind in SETS)
    for kind in SETS:
        lines = (tmp_path / kind / "zeroshot_classification_templates.txt").read_text().splitlines()
        assert lines == sentences(kind) and all(line.count("{c}") == 1 for line in lines)


def test_a_folder_of_other_amounts_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "lab.json", dataclasses.asdict(BUDGETS["quick"]))
    with pytest.raises(UsageError, match="was begun with or without --quick"):
        Lab(tmp_path, "val", "all", BUDGETS["small"]).run({}, [0], processes=1)


@pytest.mark.slow
def test_a_quick_run_and_one_more_arm(tmp_path: Path) -> None:
    def run(*words: str) -> list[str]:
        command = [sys.executable, "-m", "demo.lab", str(tmp_path), "--quick", "--seeds", "1", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]]

    assert run("--arms", "control") == [PRETRAINED, "control"]
    control = tmp_path / "seed-0" / "lab" / "control, all"
    before = (control / "val.json").stat().st_mtime_ns
    assert run("--arms", "control", "inherit")[2:] == ["inherit"]
    assert run("--arms", "control", "--set", "captions_per_image=2")[3:] == ["control, captions_per_image=2"]
    assert (control / "val.json").stat().st_mtime_ns == before
    assert run("--arms", f"{CHOSEN}, views")[-1] == f"{CHOSEN}, views"
    bank = json.loads((tmp_path / "seed-0" / "banks" / "lora-float16-views-all" / "manifest.json").read_text())
    assert list(bank["kinds"]) == ["short", "long", "long-rest", "long-sample"]
    inherited = json.loads((tmp_path / "seed-0" / "lab" / "inherit, all" / "model" / "manifest.json").read_text())[
        "config"
    ]
    assert inherited["inherit"] == "auto" and len(inherited["inherit_bank"]) == 1
    assert inherited["steps"] == BUDGETS["quick"].steps
    told = json.loads((tmp_path / "lab-val-all.json").read_text())["arms"]
    assert told["inherit"][0]["seconds"] > 0 and set(told["control"][0]["scores"]) == {*COLUMNS, *CLASSES}
