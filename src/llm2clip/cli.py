"""The command line: a table of verbs, each a config dataclass and the function that takes it.

Exit code 0 only when the artifact is whole, 2 for wrong use, 1 for a run that failed, 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.errors import LLM2CLIPError, UsageError, settings_as_flags


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, and where its config and its function live ("module:name").

    Attributes:
        memory: the flags to give, or to give lower numbers, where memory runs out; the mildest first.
    """

    summary: str
    config: str
    function: str
    memory: tuple[str, ...] = ()


VERBS = {
    "train-teacher": Verb(
        "turn an LLM into a caption encoder (stage 1)",
        "llm2clip.teacher.config:TeacherConfig",
        "llm2clip.teacher.train:train_teacher",
        memory=("--micro-batch-size", "--gradient-checkpointing", "--precision bf16"),
    ),
    "join-teachers": Verb(
        "one teacher of several, such as an LLM and a CLIP's own text half",
        "llm2clip.teacher.config:JoinConfig",
        "llm2clip.teacher.join:join_teachers",
    ),
    "build-bank": Verb(
        "encode every caption once with the teacher",
        "llm2clip.bank.config:BankConfig",
        "llm2clip.bank.build:build_bank",
        memory=("--batch-tokens", "--precision bf16", "--device cpu"),
    ),
    "bank info": Verb("what a bank holds", "llm2clip.bank.config:BankInfoConfig", "llm2clip.bank.info:bank_info"),
    "bank verify": Verb(
        "read every checksum, encode a sample again and compare",
        "llm2clip.bank.config:BankVerifyConfig",
        "llm2clip.bank.verify:verify_bank",
        memory=("--device cpu",),
    ),
    "bank add": Verb(
        "add captions or a kind, encoding only what is new",
        "llm2clip.bank.config:BankAddConfig",
        "llm2clip.bank.merge:add_to_bank",
        memory=("--batch-tokens", "--device cpu"),
    ),
    "bank merge": Verb(
        "one bank out of several", "llm2clip.bank.config:BankMergeConfig", "llm2clip.bank.merge:merge_banks"
    ),
    "bank export": Verb(
        "the vectors as Parquet or a datasets folder",
        "llm2clip.bank.config:BankExportConfig",
        "llm2clip.bank.export:export_bank",
    ),
    "train-student": Verb(
        "fine-tune a vision tower on pictures and a bank (stage 2)",
        "llm2clip.student.config:StudentConfig",
        "llm2clip.student.train:train_student",
        memory=("--micro-batch-size", "--gradient-checkpointing", "--batch-size"),
    ),
    "evaluate": Verb(
        "score retrieval and caption retrieval; writes report.json, .md, .html",
        "llm2clip.eval.config:EvaluateConfig",
        "llm2clip.eval.run:evaluate",
        memory=("--batch-size", "--precision bf16", "--device cpu"),
    ),
    "export": Verb(
        "write a folder for transformers, sentence-transformers, or the plain tower",
        "llm2clip.export.config:ExportConfig",
        "llm2clip.export.run:export_model",
        memory=("--device cpu",),
    ),
    "demo": Verb(
        "the whole pipeline on generated pictures with mini models, in minutes (in a checkout of the repository)",
        "demo.config:DemoConfig",
        "demo.run:run_demo",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: bars and names are not ASCII, some terminals are
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


@settings_as_flags()
def run(arguments: list[str]) -> int:
    """Run the verb that `arguments` name and return the exit code; errors go to stderr as one line."""
    group = _group_of_tools(arguments)
    words = arguments[1:] if group else arguments
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(tools_overview(group) if group else overview())
        return 0 if words else 2
    if arguments[0] == "--version":
        from llm2clip import __version__

        sys.stdout.write(f"llm2clip {__version__}\n")
        return 0
    _start_logging()
    verb = config = None
    try:
        verb, rest = find_verb(arguments)
        config = parse(verb, rest)
        result = _load(VERBS[verb].function)(config)
    except LLM2CLIPError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:  # a full disk, a missing right: the system's own words and the file it speaks of
        return _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's; not imported
            raise
        found = str(error).split(". GPU ")[0].rstrip(".") or "of this machine"  # torch goes on for many sentences
        return _fail(f"out of memory ({found}); {_what_needs_less(verb, config)}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it stopped", 130)
    if _is_main_process() and isinstance(result, os.PathLike):
        sys.stdout.write(f"{os.fspath(result)}\n")
    return 0


def find_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb (one or two words) at the head of `arguments`, and what follows it.

    Raises:
        UsageError: if there is no such verb; the nearest is offered.
    """
    from llm2clip.config import check_choice

    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in VERBS:
            return name, arguments[words:]
    if group := _group_of_tools(arguments):
        check_choice(f"llm2clip {group}: tool", arguments[1], [verb.split()[1] for verb in _tools(group)])
    check_choice("verb", arguments[0], VERBS)
    raise AssertionError(arguments)


def parse(verb: str, arguments: list[str]) -> Any:
    """The verb's config from its flags; `--config FILE` gives the settings of an earlier run as defaults.

    Raises:
        UsageError: for a misspelt flag, a bad value or file.
    """
    import tyro

    from llm2clip.config import from_file

    cls = _load(VERBS[verb].config)
    rest, file = _take_config_flag(arguments)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                cls,
                prog=f"llm2clip {verb}",
                args=rest,
                default=None if file is None else from_file(cls, file),
                description=f"{inspect.getdoc(cls)}\n\n--config FILE takes the settings of an earlier run "
                "(its run.json or manifest.json); flags given beside it win.",
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UsageError(f"{_one_line(complaint.getvalue())} (llm2clip {verb} --help lists the flags)") from None


def _one_line(box: str) -> str:
    """The parser's framed complaint as one line: its sections without frame, help texts and pointers.

    The frame is drawn with hyphens where stdout is not UTF-8; its first line is its title.
    """
    text = "\n".join(line.strip("│╰╯ ") for line in box.splitlines()[1:])
    sections = [" ".join(section.split()) for section in re.split(r"(?m)^[─-]{3,}$", text)]
    kept = [part for part in sections if part and not part.startswith(("For full helptext", "Argument helptext"))]
    return re.sub(r"Error parsing [A-Z]\w*: ", "", "; ".join(kept))


def _take_config_flag(arguments: list[str]) -> tuple[list[str], str | None]:
    """`arguments` without `--config FILE` (or `--config=FILE`), and the file."""
    rest: list[str] = []
    file = None
    words = iter(arguments)
    for word in words:
        if word == "--config":
            file = next(words, None)
            if file is None:
                raise UsageError("--config needs a file: the run.json or manifest.json of an earlier run")
        elif word.startswith("--config="):
            file = word.removeprefix("--config=")
        else:
            rest.append(word)
    return rest, file


def overview() -> str:
    """The text of `llm2clip --help`."""
    return "\n".join(
        [
            "usage: llm2clip VERB [flags]      llm2clip VERB --help      llm2clip --version",
            "",
            "captions -> teacher -> bank -> student -> evaluate -> export",
            "",
            *_summaries(VERBS),
            "",
        ]
    )


def tools_overview(group: str) -> str:
    """The text of `llm2clip bank --help`, for a group of verbs of two words."""
    usage = f"usage: llm2clip {group} TOOL [flags]      llm2clip {group} TOOL --help"
    return "\n".join([usage, "", *_summaries(_tools(group)), ""])


def _summaries(verbs: Collection[str]) -> list[str]:
    width = max(map(len, verbs))
    return [f"  {name:<{width}}  {VERBS[name].summary}" for name in verbs]


def _tools(group: str) -> list[str]:
    """The verbs of two words that begin with `group`."""
    return [verb for verb in VERBS if verb.startswith(f"{group} ")]


def _group_of_tools(arguments: list[str]) -> str | None:
    """The first argument, if it is no verb in itself but the first word of several."""
    first = arguments[0] if arguments else ""
    return first if first not in VERBS and _tools(first) else None


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    if module.startswith("demo."):
        _find_demo()
    return getattr(importlib.import_module(module), name)


def _what_needs_less(verb: str | None, config: Any) -> str:
    """What to type where memory ran out; what is asked for already is left out."""
    advice = []
    for flag in VERBS[verb].memory if verb is not None else ():
        name, _, value = flag.partition(" ")
        now = getattr(config, name.removeprefix("--").replace("-", "_"))
        if value or isinstance(now, bool):
            advice += [flag] if now not in (True, value, "auto") else []  # auto is bf16 where that helps
        else:
            advice.append(f"a small {flag}" if now is None else f"a smaller {flag} (now {now})")
    return f"give {' or '.join(advice)}" if advice else "it takes a machine that has more"


def _find_demo() -> None:
    """Let the demo be imported, which lies beside the package in its repository and is not installed.

    Raises:
        UsageError: if this package runs from elsewhere.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / "demo" / "run.py").exists():
        raise UsageError("the demo comes with the repository of llm2clip only: clone it and run scripts/demo there")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"llm2clip: error: {' '.join(message.split())}\n")
    return code


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _start_logging() -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars would fill a log with fragments
    # else transformers prints a table of the weights that a model lacks or has too many; what matters is said in a line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from tqdm import tqdm

    class Handler(logging.Handler):
        """Lines on stderr that do not tear a progress bar apart."""

        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logger = logging.getLogger("llm2clip")
    logger.handlers[:] = [Handler()]
    logger.setLevel(logging.INFO if _is_main_process() else logging.WARNING)
    logger.propagate = False
