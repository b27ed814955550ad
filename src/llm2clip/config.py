"""Stage configs as plain data: `kind=value` options, JSON beside artifacts, names checked with the nearest one offered.

A stage's config is one frozen keyword-only dataclass with a docstring under each field (tyro shows it as --help)
and every check in `__post_init__`. Only the stage's top function sees it; modules and losses take plain values.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from llm2clip.errors import UsageError, setting

Config = TypeVar("Config")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
"""What a `precision` can be; auto is what the machine computes fast, see `llm2clip.hub.pick_precision`."""


def _parse_columns(words: list[str]) -> dict[str, str]:
    """`["short=caption", "long=dense"]` as `{"short": "caption", "long": "dense"}`."""
    return _parse_pairs(words, "short=caption")


def _parse_views(words: list[str]) -> dict[str, str]:
    """`["long=rest,sample"]` as `{"long": "rest,sample"}`."""
    return _parse_pairs(words, "long=rest,sample")


def _parse_texts(words: list[str]) -> dict[str, str]:
    """`["nli=Find an entailed sentence."]` as `{"nli": "Find an entailed sentence."}`."""
    return _parse_pairs(words, 'name="some words"')


def _parse_pairs(words: list[str], example: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for kind, equals, value in pairs:
        if not (kind and equals and value):
            raise UsageError(f"{kind + equals + value!r} is not of the form name=value; write for example {example}")
    return {kind: value for kind, _, value in pairs}


def _parse_weights(words: list[str]) -> dict[str, float]:
    """`["short=0.5", "long=0.5"]` as `{"short": 0.5, "long": 0.5}`."""
    weights = {}
    for kind, value in _parse_pairs(words, "short=0.5").items():
        try:
            weights[kind] = float(value)
        except ValueError:
            raise UsageError(f"{kind}={value}: {value!r} is no number; write for example {kind}=0.5") from None
    return weights


def _spec(parse: Any, metavar: str) -> Any:
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{kind}={item}" for kind, item in value.items()],
    )


Columns = Annotated[Mapping[str, str], _spec(_parse_columns, "KIND=COLUMN ...")]
"""A config field given as `--field kind=column ...` on the command line, as a dict in Python."""
Views = Annotated[Mapping[str, str], _spec(_parse_views, "KIND=VIEW,... ...")]
"""A config field given as `--field kind=view,view ...` on the command line, as a dict in Python."""
Texts = Annotated[Mapping[str, str], _spec(_parse_texts, "NAME=TEXT ...")]
"""A config field given as `--field name="some words" ...` on the command line, as a dict in Python."""
Weights = Annotated[Mapping[str, float], _spec(_parse_weights, "KIND=WEIGHT ...")]
"""A config field given as `--field kind=weight ...` on the command line, as a dict in Python."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-ready data: tuples as lists, paths as text."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_plain))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def from_file(cls: type[Config], path: str | Path) -> Config:
    """The config of an earlier run, from its `run.json` or `manifest.json`, or a bare JSON object of fields; unchecked.

    Raises:
        UsageError: if the file is no such JSON or names an unknown field (the nearest name is offered).
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{setting('config')} {path} cannot be read: {error}") from None
    fields = data.get("config", data) if isinstance(data, dict) else data
    if not isinstance(fields, dict):
        raise UsageError(f"{setting('config')} {path} holds no JSON object of settings")
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for name in fields:
        check_choice(f"{setting('config')} {path}: field", name, known)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return with_open_fields(cls, values)


def with_open_fields(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """A config of some values, as defaults for the flags: unchecked, and what has no default is left to be given.

    Such as `out`, which no run records.
    """
    found = object.__new__(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = values.get(field.name, tyro.MISSING if default is dataclasses.MISSING else default)
        object.__setattr__(found, field.name, value)
    return found


def check_choice(what: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is one of `allowed`.

    Raises:
        UsageError: naming the nearest allowed value and all of them.

    >>> check_choice("precision", "bf16", ["fp32", "bf16"])
    'bf16'
    """
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UsageError(f"{what} {value!r} is unknown{hint}; choose from {', '.join(allowed)}")


def save_interval(asked: int | None, total_steps: int) -> int:
    """Steps between checkpoints or scores: as asked, or a tenth of the run, at most 500.

    >>> save_interval(None, 120), save_interval(None, 10**6), save_interval(7, 120), save_interval(None, 3)
    (12, 500, 7, 1)
    """
    return asked or max(1, min(500, total_steps // 10))


def check_positive(**values: float) -> None:
    """Check that each value is above zero; the keyword is the setting's name.

    Raises:
        UsageError: naming the first that is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{setting(name)} is {value}; it must be above 0")
