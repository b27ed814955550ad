"""Whether the settings of two runs mean the same, and what to say where they do not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip.errors import setting, shown

PATHS = frozenset(
    "data eval_data text_pairs mntp_text image_root model join teacher teachers tower baseline bank banks val_bank "
    "val_root inherit_bank root compare".split()
)
"""Settings that name files, folders or Hub ids: two spellings of one place are the same setting."""
MOST_NAMED = 3
"""Settings that differ named in a message."""


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of settings, JSON-ready, that do not mean the same; what is absent is None, as is what is empty.

    >>> differing({"data": ["a/../b.csv"], "epochs": 1}, {"data": [os.path.abspath("b.csv")], "epochs": 1.0})
    []
    >>> differing({"seed": 0}, {"seed": 0, "views": {}, "val": [], "inherit_bank": []})
    []
    >>> differing({"prompt": "./b", "seed": 0}, {"prompt": "b", "seed": 0, "split": None})
    ['prompt']
    """
    return [key for key in sorted(before.keys() | now.keys()) if _place(key, before) != _place(key, now)]


def _place(name: str, settings: Mapping[str, Any]) -> Any:
    """A setting's value, or of a path the place that it leads to from here."""
    value = settings.get(name)
    if value in ([], {}):  # a setting of later code, left out
        return None
    if name not in PATHS or value is None:
        return value
    places = [
        path if "://" in path else os.path.realpath(path) for path in ([value] if isinstance(value, str) else value)
    ]
    return places[0] if isinstance(value, str) else places


def named(before: Mapping[str, Any], now: Mapping[str, Any], changed: Sequence[str]) -> str:
    """The settings that differ, each with both values.

    >>> named({"seed": 1}, {"seed": 2}, ["seed"])
    'seed was 1, now 2'
    """
    parts = [f"{name} was {shown(before.get(name))}, now {shown(now.get(name))}" for name in changed[:MOST_NAMED]]
    return ", ".join(parts) + (f", and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else "")


def as_given(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """What to type for these settings to be as they are; empty if it is too much.

    >>> as_given({"data": ["a.csv"], "split": None}, ["data", "split"])
    "data=('a.csv',) no split"
    """
    return "" if len(names) > MOST_NAMED else " ".join(_as_given(name, settings.get(name)) for name in names)


def _as_given(name: str, value: Any) -> str:
    if value in (None, [], {}):
        return f"no {setting(name)}"
    return setting(name, tuple(value) if isinstance(value, list) else value)
