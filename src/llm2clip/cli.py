"""The command line: finds the verb, has its flags read, runs it, and turns errors into one line and an exit code.

Exit code 0 only when the artifact is whole, 2 for wrong use, 1 for a run that failed, 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Collection
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llm2clip.errors import LLM2CLIPError, UsageError, setting, settings_as_flags
from llm2clip.verbs import VERBS

REVISIONS = {"model": "model_revision", "teacher": "teacher_revision", "tower": "tower_revision", "baseline": ""}
"""Settings that name a model, and those that name its commit."""
MEMBERS = {"teachers": "revisions", "join": "join_revisions"}
"""The same of settings that name several."""
BROKEN_PIPE = 141
"""As shells say it of a program that ended by SIGPIPE, 13."""


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit with its code."""
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: bars and names are not ASCII, some terminals are
    try:
        try:
            code: int | str | None = run(sys.argv[1:] if arguments is None else arguments)
        except SystemExit as stop:  # the parser's, after --help, or of who stops a run from within, with what it says
            code = stop.code
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went; what Python still holds for it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


def _open_missing_streams() -> None:
    """Give a process that was started without standard streams ones that lead nowhere.

    Otherwise the next files to be opened take their numbers, and what libraries write to "stderr" goes into these.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (for the process's life)


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
        from llm2clip.progress import Silence  # with tqdm, which is asked for no bars by now

        with Silence(verb):
            _look_first(config)
            result = _load(VERBS[verb].function)(config)
    except LLM2CLIPError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # `main` ends the process
        raise
    except OSError as error:  # a full disk, a missing right: the system's own words and the file it speaks of
        return _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        found = str(error).split(". GPU ")[0].rstrip(".") or "of this machine"  # torch goes on for many sentences
        return _fail(f"out of memory ({found}); {_what_needs_less(verb, config)}", 1)
    except KeyboardInterrupt:
        return _fail(
            "interrupted; the same command goes on from what is written, a training from its last checkpoint", 130
        )
    if _is_main_process() and isinstance(result, os.PathLike):
        sys.stdout.write(f"{os.fspath(result)}\n")
    return 0


def _look_first(config: Any) -> None:
    """Look at names and sources before torch is imported, which takes seconds: a mistyped path is told at once.

    Raises:
        LLM2CLIPError: as the stage itself would.
    """
    from llm2clip.artifacts import check_name, is_complete
    from llm2clip.data.config import SourceConfig
    from llm2clip.on_hub import check_model

    given: list[tuple[str, Any, str | None]] = [
        (field, getattr(config, field, None), getattr(config, REVISIONS[field], None)) for field in REVISIONS
    ]
    if not is_complete(getattr(config, "out", None) or ""):  # else they are in it, and may be gone from where they were
        for field, revisions in MEMBERS.items():
            members = zip_longest(getattr(config, field, ()), getattr(config, revisions, ()))
            given += [(field, *member) for member in members]
    # verify calls no teacher none; a name with a colon, such as open_clip:NAME, is for evaluate alone to judge
    names = [one for one in given if ":" not in (one[1] or ":") and one[1] != "none"]
    for field, name, _ in names:
        check_name(name, what=setting(field))
    if isinstance(config, SourceConfig):
        from llm2clip.data.source import look_at_sources

        look_at_sources(config)
    for field, name, revision in names:  # last, as it may go over the network
        check_model(name, revision=revision, what=setting(field))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator found no room: Python's, a GPU's, or torch's for the CPU, which has no error of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's; not imported
        or "DefaultCPUAllocator" in str(error)
    )


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
    from llm2clip import flags

    return flags.parse(verb, VERBS[verb], _load(VERBS[verb].config), arguments)


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
    with contextlib.suppress(OSError):
        sys.stderr.write(f"llm2clip: error: {' '.join(message.split())}\n")
    return code


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _start_logging() -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars would fill a log with fragments
    # else transformers prints a table of the weights that a model lacks or has too many; what matters is said in a line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # that bf16 may be slow: we take what is not
    from tqdm import tqdm

    class Handler(logging.Handler):
        """Lines on stderr that do not tear a progress bar apart."""

        def emit(self, record: logging.LogRecord) -> None:
            with contextlib.suppress(OSError):  # its reader went: a run does not end for that
                tqdm.write(self.format(record), file=sys.stderr)

    logger = logging.getLogger("llm2clip")
    logger.handlers[:] = [Handler()]
    logger.setLevel(logging.INFO if _is_main_process() else logging.WARNING)
    logger.propagate = False
