"""How messages name settings: as fields in Python, as flags while the command line runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llm2clip
from llm2clip import cli
from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankConfig
from llm2clip.errors import TooManyBadSamples, UsageError, setting, settings_as_flags
from llm2clip.student.config import StudentConfig
from llm2clip.teacher.config import TeacherConfig
from llm2clip.verbs import Verb

PACKAGE = Path(llm2clip.__file__).parent


@pytest.fixture(autouse=True)
def logging_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command sets logging up for its process; other tests here read what is logged."""
    monkeypatch.setattr(cli, "_start_logging", lambda: None)


@pytest.mark.parametrize(
    ("words", "python", "flag"),
    [
        (("batch_size",), "batch_size", "--batch-size"),
        (("precision", "fp32"), "precision='fp32'", "--precision fp32"),
        (("lora_rank", 0), "lora_rank=0", "--lora-rank 0"),
        (("gradient_checkpointing", True), "gradient_checkpointing=True", "--gradient-checkpointing"),
        (("random_negative", False), "random_negative=False", "--no-random-negative"),
        (("bank", ("DIR",)), "bank=('DIR',)", "--bank DIR"),
        (("data", ("a.csv", "b.csv")), "data=('a.csv', 'b.csv')", "--data a.csv b.csv"),
        (("mix", {"short": 0.5, "long": 1}), "mix={'short': 0.5, 'long': 1}", "--mix short=0.5 long=1"),
    ],
)
def test_a_setting_in_both_forms(words: tuple[Any, ...], python: str, flag: str) -> None:
    assert setting(*words) == python
    with settings_as_flags():
        assert setting(*words) == flag
        with settings_as_flags():
            assert setting(*words) == flag
        assert setting(*words) == flag, "what began it ends it"
    assert setting(*words) == python


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(UsageError, match=r"^--steps$"), settings_as_flags():
        raise UsageError(setting("steps"))
    assert setting("steps") == "steps"


@pytest.mark.parametrize(
    ("words", "config", "python", "flags"),
    [
        (
            "train-student --bank b --tower t --out o --batch-size 1",
            lambda: StudentConfig(bank=("b",), tower="t", out=Path("o"), batch_size=1),
            "batch_size is 1; it must be at least 2",
            "--batch-size is 1; it must be at least 2",
        ),
        (
            "train-teacher --data d --model m --out o --tuning full --quantize",
            lambda: TeacherConfig(data=("d",), model="m", out=Path("o"), tuning="full", quantize=True),
            "quantize trains adapters only; add tuning='lora'",
            "--quantize trains adapters only; add --tuning lora",
        ),
        (
            "build-bank --data d --teacher t --out o --precision fp61",
            lambda: BankConfig(data=("d",), teacher="t", out=Path("o"), precision="fp61"),
            "precision 'fp61' is unknown (did you mean 'fp16'?)",
            "--precision 'fp61' is unknown (did you mean 'fp16'?)",
        ),
    ],
    ids=["a value", "a value to type", "a choice"],
)
def test_a_config_that_cannot_be(
    words: str, config: Callable[[], object], python: str, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the way to the command line the parser catches the error and prints it in its own frame."""
    for _ in range(2):  # the second time after a command has run in this process
        with pytest.raises(UsageError, match=f"^{re.escape(python)}"):
            config()
        assert cli.run(words.split()) == 2
        assert capsys.readouterr().err.startswith(f"llm2clip: error: {flags}")


def test_what_a_run_finds_wrong(tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,a red disc\n../b.jpg,a blue disc\n")
    data, out = tmp_path / "t.csv", tmp_path / "bank"
    says = "2 of 2 samples are bad, above {} 0.1: 1 empty image, 1 outside the table's folder"
    with pytest.raises(TooManyBadSamples, match=f"^{says.format('max_bad_fraction')}"):
        build_bank(BankConfig(data=(str(data),), teacher=str(tiny_llm), out=out, max_bad_fraction=0.1))
    words = f"build-bank --data {data} --teacher {tiny_llm} --out {out} --max-bad-fraction 0.1"
    assert cli.run(words.split()) == 1
    assert says.format("--max-bad-fraction") in capsys.readouterr().err


def test_after_a_command_settings_are_fields_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        cli.run(["train-student", "--help"])
    assert setting("steps") == "steps"
    monkeypatch.setitem(cli.VERBS, "broken", Verb(summary="", config=f"{__name__}:no_such_config", function=""))
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        cli.run(["broken"])
    assert setting("steps") == "steps"


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string but docstrings, with {} for what an f-string puts in."""
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield (
                node.lineno,
                "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def flags_in(text: str) -> list[str]:
    """The flags that a message holds, but for those of a whole command such as `llm2clip export --to tower`."""
    return re.findall(r"--[a-z{][\w-]*", re.sub(r"`[a-z][^`]*`", "", text))


def test_literals_and_flags_are_found() -> None:
    code = '"""--doc"""\nx = "give --a-b c"\ny = f"--{name} is {f(\'--d\')} of --e, as `run --f` --" "g"\n'
    assert [(line, flags_in(text)) for line, text in literals(ast.parse(code))] == [
        (2, ["--a-b"]),
        (3, ["--{", "--e", "--g"]),
        (3, ["--d"]),
    ]


def test_no_message_holds_a_flag() -> None:
    """A flag written out would reach those who never typed one: `errors.setting` writes it where it belongs."""
    ours = {"cli.py", "errors.py", "flags.py", "verbs.py"}  # the command line itself, and what writes flags for it
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in ours:
            places = [(line, text) for line, text in literals(ast.parse(path.read_text())) if flags_in(text)]
            found.update({name: places} if places else {})
    assert not found
