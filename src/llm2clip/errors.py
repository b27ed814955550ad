"""The exceptions of llm2clip, as a tree; the command line prints each as one line.

LLM2CLIPError            the run failed                                  exit code 1
├── UsageError           wrong use: a value to change, a flag to type    exit code 2 (also a ValueError)
├── SourceError          an image-caption source cannot be read         exit code 1
├── TooManyBadSamples    more bad samples than --max-bad-fraction        exit code 1
└── ArtifactError        a bank, teacher or student folder is damaged    exit code 1

Every message is one line: what was wrong, its value, and what to do about it.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_as_flags = False
"""Whether the command line runs, and with it every message names settings as flags; of the whole process."""


class LLM2CLIPError(Exception):
    """A run that cannot go on; its message is one line for the user. All others here are kinds of it.

    Attributes:
        exit_code: what the command line ends with, 1, or 2 for wrong use.

    Example:
        >>> issubclass(ArtifactError, LLM2CLIPError), LLM2CLIPError.exit_code, UsageError.exit_code
        (True, 1, 2)
    """

    exit_code = 1


class UsageError(LLM2CLIPError, ValueError):
    """A wrong argument, setting or combination of them; the message says what to type.

    Example:
        >>> from llm2clip import StudentConfig
        >>> StudentConfig(bank=("bank",), tower="tower", out="student", precision="fp8")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        llm2clip.errors.UsageError: precision 'fp8' ...
    """

    exit_code = 2


class SourceError(LLM2CLIPError):
    """A source of images and captions, as a whole, cannot be read: damaged, empty, or not what its name says."""


class TooManyBadSamples(LLM2CLIPError):
    """More samples were bad than `max_bad_fraction` allows, 0.05 by default; the causes are counted in the message."""


class ArtifactError(LLM2CLIPError):
    """A folder written by an earlier stage is unfinished, damaged or of another kind."""


@contextmanager
def settings_as_flags() -> Iterator[None]:
    """While this runs, `setting` writes flags; for the command line alone, whose user types them."""
    global _as_flags
    before, _as_flags = _as_flags, True
    try:
        yield
    finally:
        _as_flags = before


def setting(name: str, value: object = None) -> str:
    """How a config's field is written in a message: as in Python, or while the command line runs as its flag.

    Args:
        value: what to give it, where the message says so; in capitals if the user is to choose it.

    >>> setting("batch_size"), setting("precision", "fp32"), setting("bank", ("DIR",))
    ('batch_size', "precision='fp32'", "bank=('DIR',)")
    >>> with settings_as_flags():
    ...     setting("batch_size"), setting("precision", "fp32"), setting("bank", ("DIR",))
    ('--batch-size', '--precision fp32', '--bank DIR')
    >>> with settings_as_flags():
    ...     setting("prompt", "a red disc")
    "--prompt 'a red disc'"
    """
    if not _as_flags:
        return name if value is None else f"{name}={value!r}"
    flag = name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return f"--no-{flag}" if value is False else f"--{flag}"
    if isinstance(value, Mapping):
        value = tuple(f"{key}={item}" for key, item in value.items())
    return " ".join(
        [f"--{flag}", *(shlex.quote(str(item)) for item in (value if isinstance(value, tuple) else [value]))]
    )


def shown(value: object, *, most: int = 80) -> str:
    """A value from somebody's data as a message may quote it: its repr, cut where it would fill a screen.

    >>> shown("a" * 100, most=10)
    "'aaaaaaaa... (102 characters)"
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}... ({len(text):,} characters)"


def shortened(text: str, *, most: int = 300) -> str:
    r"""What another library says, in one line of at most `most` characters that ends with a whole word.

    >>> shortened("is no model,\nread the docs", most=16)
    'is no model, ...'
    """
    return textwrap.shorten(text, most, placeholder=" ...")


def one_line(error: BaseException) -> str:
    r"""What an exception says, in one line: its first that is not blank.

    >>> one_line(ValueError("\n  no such file\nsee the docs"))
    'no such file'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
