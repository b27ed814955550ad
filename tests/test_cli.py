"""The command line: one line for every wrong use, exit codes, --config, light import."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llm2clip import cli, progress
from llm2clip.config import Columns, Texts, Weights, to_dict
from llm2clip.data.config import SourceConfig
from llm2clip.errors import ArtifactError, UsageError, setting
from llm2clip.flags import field_docs, group_settings
from llm2clip.verbs import VERBS, Verb

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Do a toy thing."""

    data: tuple[str, ...]
    """Sources."""

    captions: Columns = dataclasses.field(default_factory=dict)
    """Columns by kind."""

    mix: Weights = dataclasses.field(default_factory=dict)
    """Weights by kind."""

    words: Texts = dataclasses.field(default_factory=dict)
    """Words by name."""

    batch_size: int = 4
    """Images a step."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"{setting('batch_size')} is {self.batch_size}; it must be above 0")


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets logging up for its process; what other tests see of it is put back."""
    logger = logging.getLogger("llm2clip")
    before = logger.handlers[:], logger.level, logger.propagate
    for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that it is put back
        monkeypatch.delenv(name)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ToyConfig]:
    """The configs that the toy verb was run with."""
    configs: list[ToyConfig] = []
    module = types.ModuleType("toy_verb")
    module.ToyConfig, module.run = ToyConfig, configs.append
    monkeypatch.setitem(sys.modules, "toy_verb", module)
    monkeypatch.setitem(cli.VERBS, "toy", Verb(summary="toy", config="toy_verb:ToyConfig", function="toy_verb:run"))
    monkeypatch.setitem(
        cli.VERBS, "toy tool", Verb(summary="toy", config="toy_verb:ToyConfig", function="toy_verb:run")
    )
    return configs


def test_flags_become_the_config(seen: list[ToyConfig]) -> None:
    words = "toy --data a.csv b.tar --captions short=x long=y --mix short=0.25 --batch-size 8".split()
    assert cli.run(words) == 0
    assert seen == [
        ToyConfig(data=("a.csv", "b.tar"), captions={"short": "x", "long": "y"}, mix={"short": 0.25}, batch_size=8)
    ]


def test_a_silent_run_shows_that_it_lives(
    seen: list[ToyConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = threading.active_count()
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(progress.Progress, "moved", float("-inf"))
    monkeypatch.setattr(sys.modules["toy_verb"], "run", lambda config: time.sleep(0.6))
    assert cli.run(["toy", "tool", "--data", "a"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert 1 <= len(told) <= 4 and set(told) <= {f"toy tool: still at work, nothing new for {s} s" for s in (0, 1)}
    assert threading.active_count() == threads


def test_a_verb_of_two_words_is_found(seen: list[ToyConfig]) -> None:
    assert cli.run(["toy", "tool", "--data", "a"]) == 0
    assert seen[0].data == ("a",)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("toi", "did you mean 'toy'"),
        ("toy --data a --mix short=half", "'half' is no number; write for example short=0.5"),
        ("toy --data a --captions short", "short=caption"),
        ("toy --data a --mix short", "short=0.5"),
        ("toy --data a --words short", 'name="some words"'),
        ("toy --data a --batch-size x", "--batch-size"),
        ("toy --data a --batch-size 0", "--batch-size is 0; it must be above 0"),
        ("toy --data a --batch-sise 3", "--batch-size"),
        ("toy", "--data"),
        ("toy --data a --config", "--config needs a value"),
        ("toy --data a --config /nowhere.json", "/nowhere.json"),
        ("bank inof", "did you mean 'info'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    words: str, part: str, seen: list[ToyConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(words.split()) == 2
    out, err = capsys.readouterr()
    assert part in err
    assert err.startswith("llm2clip: error: ") and err.count("\n") == 1 and out == ""
    assert not seen


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ArtifactError("broken"), 1, "broken"),
        (OSError(28, "No space left on device", "x"), 1, "[Errno 28] No space left on device: 'x'"),
        (MemoryError(), 1, "out of memory (of this machine); it takes a machine that has more"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            1,
            "out of memory ([enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes); "
            "it takes a machine that has more",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
            1,
            "out of memory (CUDA out of memory. Tried to allocate 20 GiB); it takes a machine that has more",
        ),
        (
            KeyboardInterrupt(),
            130,
            "interrupted; the same command goes on from what is written, a training from its last checkpoint",
        ),
    ],
)
def test_a_failed_run_is_one_line(
    error: BaseException,
    code: int,
    line: str,
    seen: list[ToyConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: ToyConfig) -> None:
        raise error

    monkeypatch.setattr(sys.modules["toy_verb"], "run", fail)
    assert cli.run(["toy", "--data", "a"]) == code
    assert capsys.readouterr().err == f"llm2clip: error: {line}\n"


def test_config_of_an_earlier_run_is_the_default_and_flags_win(seen: list[ToyConfig], tmp_path: Path) -> None:
    earlier = ToyConfig(data=("a", "b"), captions={"short": "x"}, mix={"short": 1.0}, batch_size=16)
    (tmp_path / "run.json").write_text(json.dumps({"kind": "toy", "config": to_dict(earlier)}))
    assert cli.run(["toy", "--config", str(tmp_path / "run.json")]) == 0
    assert cli.run(["toy", f"--config={tmp_path / 'run.json'}", "--batch-size", "2"]) == 0
    assert seen == [earlier, dataclasses.replace(earlier, batch_size=2)]


def test_unknown_field_in_a_config_file_names_the_nearest(
    seen: list[ToyConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"data": ["a"], "batch_sise": 3}))
    assert cli.run(["toy", "--config", str(tmp_path / "run.json")]) == 2
    assert "did you mean 'batch_size'" in capsys.readouterr().err


def field_texts(cls: type) -> dict[str, str]:
    """What the source says under each field of a config, its base classes' fields included, by the field's name."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                said = below.value if isinstance(below, ast.Expr) else None
                texts[field.target.id] = str(said.value) if isinstance(said, ast.Constant) else ""
    return texts


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_help_has_every_flag_with_its_text(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # wider, groups stand side by side
    with pytest.raises(SystemExit) as stop:
        cli.run([*verb.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--config FILE" in out
    shown = re.sub(r"[\s│]", "", out)
    cls = cli._load(cli.VERBS[verb].config)
    texts = field_texts(cls)
    for field in dataclasses.fields(cls):
        positional = "Positional" in str(field.type)
        assert re.search(rf"(?<![\w-])--{field.name.replace('_', '-')}(?![\w-])", out) or positional, field.name
        assert len(texts[field.name].split()) > 1, f"{field.name} has no text"
        assert "".join(texts[field.name].split()) in shown, f"{field.name}: its text is not in the help"
    assert "{None}" not in shown and "(default:None)" not in shown and "(default:)" not in shown


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_has_each_setting_once_in_groups_of_few(name: str) -> None:
    verb = VERBS[name]
    cls = cli._load(verb.config)
    groups = group_settings(cls, verb)
    shown = [one.name for own in groups.values() for one in own]
    fields = [one.name for one in dataclasses.fields(cls)]
    assert sorted(shown) == sorted(fields) and set(verb.groups.values()) <= set(fields)
    assert "" not in groups, f"{groups['']} come before the first group"
    assert max(map(len, groups.values())) <= 9
    assert set(field_docs(cls)) >= set(fields)
    words = shlex.split(verb.example)
    assert cli.parse(name, words[1 + len(name.split()) :]) is not None


def test_help_puts_first_what_matters_and_ends_with_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["train-student", "--help"])
    text = capsys.readouterr().out
    places = [text.index(flag) for flag in ("--bank ", "--tower ", "--val-bank ", "--dim ", "--layer-decay ")]
    assert places == sorted(places)
    assert "optimizer options" in text
    assert text.rstrip().endswith("--tower openai/clip-vit-base-patch16 --out student")
    assert "recognised without it." in field_docs(SourceConfig)["captions"]


@pytest.mark.parametrize(
    ("tail", "code"),
    [(">/dev/null 2>&-", 0), (">&-", 0), (">&- 2>&- <&-", 0), ("| true; exit ${PIPESTATUS[0]}", 141), ("bank 2>&-", 2)],
)
def test_streams_that_are_closed_or_broken(tail: str, code: int) -> None:
    command = f"{shlex.quote(sys.executable)} -m llm2clip {'' if code == 2 else '--help'} {tail}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("build-bank --data nothing.csv --teacher org/llm --out out", "nothing.csv: no such file or folder"),
        ("build-bank --data t.csv --captions raw=texts --teacher org/llm --out out", "no column 'texts'"),
        ("build-bank --data t.csv --teacher ./llm --out out", "./llm is no folder"),
        ("train-teacher --data t.csv u.csv --model org/llm --out out", "u.csv: no such file or folder"),
        ("train-student --bank bank --tower /no/tower --out out", "/no/tower is no folder"),
        ("train-teacher --data t.csv --model . --join ./clip --out out", "--join ./clip is no folder"),
        ("join-teachers --teachers . /no/clip --out out", "--teachers /no/clip is no folder"),
        ("evaluate --data t.csv --model org/clip --out out", "image '../a.jpg' lies outside the table's folder"),
        ("evaluate --data c.csv --teacher . --baseline ./clip --out out", "--baseline ./clip is no folder"),
        ("export --model student/x/y --to tower --out out", "student/x/y is no folder"),
        ("build-bank --data i.csv --teacher org/llm --out out", "images: give --image-root images"),
        ("train-student --bank bank --tower org/tower --out out", "--tower org/tower is no folder here, and the Hub "),
    ],
)
def test_a_mistyped_path_is_told_before_torch_is_imported(command: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n../a.jpg,a cat\n")
    (tmp_path / "i.csv").write_text("image,caption\na.jpg,a cat\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    code = f"""
import sys
from llm2clip import cli
code = cli.run({command.split()!r})
print(code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["2 False"], done.stderr
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_log_whose_reader_went_does_not_end_a_run(
    seen: list[ToyConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def speak(config: ToyConfig) -> Path:
        logging.getLogger("llm2clip").info("news")
        return tmp_path

    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys.modules["toy_verb"], "run", speak)
    with contextlib.suppress(BrokenPipeError), open(write, "w", buffering=1) as broken:  # closing it complains, too
        monkeypatch.setattr(sys, "stderr", broken)
        assert cli.run(["toy", "--data", "a"]) == 0
        assert cli.run(["toy", "--date", "a"]) == 2


COMMANDS = re.compile(r"^(?:\$ )?(llm2clip [a-z][^#\n]*)", flags=re.MULTILINE)


def commands() -> list[str]:
    """The whole commands that README and docs show in blocks of shell code."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [
        b for page in pages for b in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text("utf-8"), re.S)
    ]
    found = [command.strip() for block in blocks for command in COMMANDS.findall(block.replace("\\\n", " "))]
    return [command for command in dict.fromkeys(found) if not re.search(r"[|&<>$]|\.\.\.|VERB|--help", command)]


def test_the_commands_of_the_docs_are_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(commands()) >= 5
    wrong = {}
    for command in commands():
        try:
            verb, rest = cli.find_verb(shlex.split(command)[1:])
            cli.parse(verb, rest)
        except UsageError as error:
            wrong[command] = str(error)
    assert not wrong


def test_what_a_run_made_is_printed_by_the_main_process_alone(
    seen: list[ToyConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["toy_verb"], "run", lambda config: Path("made/here"))
    for rank, printed in (("0", "made/here\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert cli.run(["toy", "--data", "a"]) == 0
        assert capsys.readouterr().out == printed


def test_other_processes_log_warnings_alone(
    seen: list[ToyConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(config: ToyConfig) -> None:
        logging.getLogger("llm2clip").info("news")
        logging.getLogger("llm2clip").warning("a warning")

    monkeypatch.setattr(sys.modules["toy_verb"], "run", speak)
    for rank, said in (("0", "news\na warning\n"), ("1", "a warning\n")):
        monkeypatch.setenv("RANK", rank)
        cli.run(["toy", "--data", "a"])
        assert capsys.readouterr().err == said


def test_bars_of_other_libraries_stay_out_of_a_log(seen: list[ToyConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        cli.run(["toy", "--data", "a"])
        assert os.environ.get("TQDM_DISABLE") == (None if terminal else "1")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"llm2clip {importlib.metadata.version('llm2clip')}\n"


@pytest.mark.parametrize(("words", "code"), [("bank --help", 0), ("bank -h", 0), ("bank", 2)])
def test_a_verb_of_several_tools_lists_them(words: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words.split()) == code
    out, err = capsys.readouterr()
    assert out.startswith("usage: llm2clip bank TOOL [flags]") and err == ""
    tools = [verb for verb in cli.VERBS if verb.startswith("bank ")]
    assert len(tools) == 5
    assert [line.strip().split("  ")[0] for line in out.splitlines() if line.startswith("  ")] == tools
    assert all(cli.VERBS[tool].summary in out for tool in tools)


def test_a_group_of_tools_that_is_none_is_still_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ban", "--help"]) == 2
    assert "verb 'ban' is unknown" in capsys.readouterr().err


def test_importing_the_package_and_asking_for_help_is_light() -> None:
    code = (
        "import sys, llm2clip, llm2clip.cli as cli; cli.run(['--help']);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_bars_of_other_libraries_fill_no_log() -> None:
    code = "import llm2clip.cli as cli; cli.run(['recipes']); from tqdm import tqdm; list(tqdm(range(3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout and done.stderr == ""


def test_a_terminal_that_knows_only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(cli, "overview", lambda: "█ 圆\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    sys.stdout.flush()
    assert stop.value.code == 0 and written.getvalue() == b"\\u2588 \\u5706\n"


def test_the_demo_is_found_in_a_checkout_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "demo").is_dir()])
    for name in [name for name in sys.modules if name == "demo" or name.startswith("demo.")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.run(["demo", "--seeds", "0", "--out", str(tmp_path / "demo")]) == 2
    assert "--seeds is 0" in capsys.readouterr().err  # its own settings were read
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "llm2clip" / "cli.py"))
    assert cli.run(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "the demo comes with the repository of llm2clip only: clone it" in capsys.readouterr().err


@pytest.mark.parametrize("capture", ["capsys", "capfd"], ids=["frame of hyphens", "frame of lines"])
def test_the_parsers_frame_is_taken_off(capture: str, seen: list[ToyConfig], request: pytest.FixtureRequest) -> None:
    """It draws lines only where it takes stdout for UTF-8, as it does what `capfd` puts there."""
    captured = request.getfixturevalue(capture)
    for words, says in (
        ("toy --data a --batch-size 0", "--batch-size is 0; it must be above 0"),
        ("toy --batch-sise 3", "Missing from llm2clip toy: --data [STR [STR ...]] Sources. (required); "),
    ):
        assert cli.run(words.split()) == 2
        err = captured.readouterr().err
        assert err.startswith(f"llm2clip: error: {says}") and err.endswith(" (llm2clip toy --help lists the flags)\n")
        assert not set(err) & set("─│╭╮╰╯") and "---" not in err and "helptext" not in err


def test_what_stops_a_run_from_within_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints the words of a SystemExit and ends with 1; only if they reach it."""

    def stops(arguments: list[str]) -> int:
        raise SystemExit("no more of this")

    monkeypatch.setattr(cli, "run", stops)
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == "no more of this"
