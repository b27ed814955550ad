"""Recipes: settings that belong together, a file each. `--recipe NAME` of a training takes them; flags beside it win.

A file's functions `teacher` and `student`, those it has, return the whole settings of that training.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from llm2clip import recipes
from llm2clip.config import check_choice, with_open_fields
from llm2clip.errors import setting
from llm2clip.parts import part_names

TRAININGS = {"train-teacher": "teacher", "train-student": "student"}
"""Verbs that take a recipe, and its function for each."""
STAND_INS: dict[str, Any] = {"data": ("data",), "bank": ("bank",), "out": Path("out")}
"""For what a recipe's function is called with where only its settings are asked for."""


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """What recipes there are; of one, what it is for and the settings it gives."""

    name: Positional[str | None] = None
    """The recipe to tell of. By default all are named."""


def list_recipes(config: RecipesConfig) -> None:
    """Print the recipes, or what one of them gives.

    Raises:
        UsageError: for an unknown one.
    """
    if config.name is None:
        width = max(map(len, part_names(recipes)))
        lines = [f"{name:<{width}}  {_doc(name)[0]}" for name in part_names(recipes)]
    else:
        lines = [*_doc(config.name), ""]
        for verb in TRAININGS:
            if (settings := settings_of(config.name, verb)) is not None:
                words = [setting(name, value) for name, value in changed(settings).items()]
                lines.append(" ".join(["llm2clip", verb, *words]))
    sys.stdout.writelines(f"{line}\n" for line in lines)


def settings_of(name: str, verb: str) -> Any | None:
    """The settings that a recipe gives a training, with what the user must give left open; None if it has none for it.

    Raises:
        UsageError: for an unknown recipe.
    """
    make = getattr(_find(name), TRAININGS[verb], None)
    if make is None:
        return None
    needed = [name for name, one in inspect.signature(make).parameters.items() if one.kind is not one.VAR_KEYWORD]
    whole = make(**{name: STAND_INS.get(name, name) for name in needed})
    return with_open_fields(type(whole), {**vars(whole), **dict.fromkeys(needed, tyro.MISSING)})


def changed(settings: Any) -> dict[str, Any]:
    """Those of the settings that differ from the defaults.

    >>> changed(settings_of("paper", "train-student"))["adaptor_learning_rate"]
    1e-05
    """
    found = {}
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if value is not tyro.MISSING and value != default:
            found[one.name] = value
    return found


def _find(name: str) -> Any:
    check_choice(setting("recipe"), name, part_names(recipes))
    return importlib.import_module(f"{recipes.__name__}.{name.replace('-', '_')}")


def _doc(name: str) -> list[str]:
    return inspect.cleandoc(_find(name).__doc__).splitlines()
