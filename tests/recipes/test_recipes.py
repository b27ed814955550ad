"""Recipes: what `--recipe NAME` gives a training, what wins beside it, and what `llm2clip recipes` tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from llm2clip import cli, recipes
from llm2clip.errors import UsageError, settings_as_flags
from llm2clip.parts import part_names
from llm2clip.recipes import paper

STUDENT = "--bank bank --tower tower --out student"


def parse(verb: str, words: str) -> object:
    return cli.parse(verb, words.split())


def test_a_recipe_gives_the_settings_and_flags_beside_it_win() -> None:
    given = parse("train-student", f"--recipe paper {STUDENT}")
    assert given == paper.student(("bank",), "tower", Path("student"))
    changed = parse("train-student", f"{STUDENT} --recipe=paper --epochs 20 --inherit auto")
    assert changed == paper.student(("bank",), "tower", Path("student"), epochs=20, inherit="auto")
    short = parse("train-student", f"--recipe paper {STUDENT} --steps 100")
    assert short == paper.student(("bank",), "tower", Path("student"), epochs=None, steps=100)
    teacher = parse("train-teacher", "--recipe paper --data a.csv --model llm --out teacher")
    assert teacher == paper.teacher(("a.csv",), "llm", Path("teacher"))


def test_the_papers_settings_are_the_papers() -> None:
    """arXiv 2411.04997, sections 3 and 6.2, and the released code."""
    student = paper.student(("bank",), "tower", Path("student"))
    assert (student.learning_rate, student.adaptor_learning_rate, student.epochs, student.batch_size) == (
        1e-5,
        1e-5,
        4,
        4096,
    )
    assert (student.inherit, student.dim, student.weight_decay, student.layer_decay) == ("none", 1280, 0.05, 0.85)
    teacher = paper.teacher(("a.csv",), "llm", Path("teacher"))
    assert (teacher.learning_rate, teacher.batch_size, teacher.epochs, teacher.lora_rank) == (2e-4, 512, 1, 16)


def test_what_a_recipe_leaves_open_must_be_given() -> None:
    with pytest.raises(UsageError, match="Missing from llm2clip train-student: --tower"):
        parse("train-student", "--recipe paper --bank bank --out student")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--recipe papr", "--recipe 'papr' is unknown (did you mean 'paper'?)"),
        ("--recipe", "--recipe needs a value"),
        ("--recipe paper --config run.json", "--config run.json and --recipe paper exclude each other"),
    ],
)
def test_wrong_use_is_one_line(words: str, line: str) -> None:
    with settings_as_flags(), pytest.raises(UsageError) as caught:
        parse("train-student", f"{STUDENT} {words}")
    assert str(caught.value).startswith(line)


def test_a_recipe_that_says_nothing_of_a_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(paper, "teacher")
    with pytest.raises(UsageError, match="--recipe paper says nothing of train-teacher"):
        parse("train-teacher", "--recipe paper --data a.csv --model llm --out teacher")


@pytest.mark.parametrize("name", part_names(recipes))
def test_each_is_told_by_flags_that_give_the_same_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", name]) == 0
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("llm2clip train-")]
    assert commands
    needed = {"train-teacher": "--data a --model llm --out o", "train-student": STUDENT}
    for _, verb, *flags in commands:
        by_hand = cli.parse(verb, [*flags, *needed[verb].split()])
        assert by_hand == parse(verb, f"--recipe {name} {needed[verb]}")


def test_the_list_names_each_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == part_names(recipes)
    assert "What the paper and its released code did" in lines[part_names(recipes).index("paper")]


def test_what_must_be_given_is_open_in_the_settings() -> None:
    settings = recipes.settings_of("paper", "train-student")
    assert settings.tower is tyro.MISSING and settings.out is tyro.MISSING and settings.epochs == 4
