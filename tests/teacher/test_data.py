"""What a run reads: tasks with the settings of their own, and the captions it is scored on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.data import prepare_probe, prepare_tasks


@pytest.fixture
def config(tmp_path: Path):
    rows = {
        "all": [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}", "instruction": "Say."} for i in range(4)],
        "some": [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}" if i else None} for i in range(4)],
        "none": [{"query": f"q{i}", "positive": f"p{i}"} for i in range(4)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = "".join(f"short {i},long {i}\n" for i in range(6))
    (tmp_path / "captions.csv").write_text("short_caption,long_caption\n" + table)
    (tmp_path / "held-out.csv").write_text("short_caption,long_caption\nx,y\nz,w\n")

    def make(**changes: object) -> TeacherConfig:
        settings = {"data": (str(tmp_path / "captions.csv"),), "model": "m", "out": tmp_path / "out"}
        settings["text_pairs"] = tuple(str(tmp_path / f"{name}.jsonl") for name in rows)
        return TeacherConfig(**{**settings, **changes})

    return make


def test_each_task_has_its_instruction_and_negatives(config, tmp_path, caplog) -> None:
    tasks, facts = prepare_tasks(config(instructions={"some": "Other."}, caption_instruction="Find."), tmp_path)
    assert [task.name for task in tasks] == ["captions", "all", "some", "none"]
    assert [task.instruction for task in tasks] == ["Find.", "Say.", "Other.", ""]
    assert [task.negatives for task in tasks] == [True] * 4
    assert facts["rows"] == {"captions": 6, "all": 4, "some": 4, "none": 4}
    assert "negatives are not used" not in caplog.text
    tasks, _ = prepare_tasks(config(random_negative=False, instructions={"all": ""}), tmp_path)  # read back
    assert [task.negatives for task in tasks] == [False, True, False, False]
    assert tasks[1].instruction == ""
    assert caplog.text.count("negatives are not used") == 1 and "some.jsonl" in caplog.text and "75%" in caplog.text


def test_held_out_captions_are_scored_if_given_else_some_of_the_training(config, tmp_path) -> None:
    tasks, _ = prepare_tasks(config(), tmp_path)
    taken = prepare_probe(config(eval_images=3), tasks)
    assert len(taken) == 3 and all(short.startswith("short") and long.startswith("long") for short, long in taken)
    assert prepare_probe(config(eval_data=(str(tmp_path / "held-out.csv"),)), tasks) == [("x", "y"), ("z", "w")]
    assert prepare_probe(config(eval_data=(str(tmp_path / "held-out.csv"),), eval_images=2), tasks[1:]) != []
    assert prepare_probe(config(data=()), tasks[1:]) == []
