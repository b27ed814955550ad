"""The exceptions of llm2clip, as a tree; the command line prints each as one line.

LLM2CLIPError            the run failed                                  exit code 1
├── UsageError           wrong use: a value to change, a flag to type    exit code 2 (also a ValueError)
├── SourceError          a picture-caption source cannot be read         exit code 1
├── TooManyBadSamples    more bad samples than --max-bad-fraction        exit code 1
└── ArtifactError        a bank, teacher or student folder is damaged    exit code 1

Every message is one line: what was wrong, its value, and what to do about it.
"""

from __future__ import annotations


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
        llm2clip.errors.UsageError: --precision 'fp8' ...
    """

    exit_code = 2


class SourceError(LLM2CLIPError):
    """A source of pictures and captions, as a whole, cannot be read: damaged, empty, or not what its name says."""


class TooManyBadSamples(LLM2CLIPError):
    """More samples were bad than `max_bad_fraction` allows, 0.05 by default; the causes are counted in the message."""


class ArtifactError(LLM2CLIPError):
    """A folder written by an earlier stage is unfinished, damaged or of another kind."""


def one_line(error: BaseException) -> str:
    r"""What an exception says, in one line: its first that is not blank.

    >>> one_line(ValueError("\n  no such file\nsee the docs"))
    'no such file'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
