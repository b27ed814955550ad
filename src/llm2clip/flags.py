"""The flags of a verb: its settings' dataclass as groups of a help page, and what was typed as that dataclass."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import sys
import textwrap
import typing
from typing import Annotated, Any

import tyro

from llm2clip.config import from_file
from llm2clip.errors import UsageError
from llm2clip.recipes import TRAININGS, settings_of
from llm2clip.verbs import Verb

CONFIG = (
    "--config FILE takes the settings of an earlier run (its run.json or manifest.json); flags given beside it win."
)
RECIPE = " --recipe NAME takes those of a recipe (llm2clip recipes lists them)."


def parse(name: str, verb: Verb, cls: type[Any], arguments: list[str]) -> Any:
    """A verb's settings from its flags; `--config FILE` gives those of an earlier run as defaults, `--recipe` its own.

    Raises:
        UsageError: for a misspelt flag, a bad value or file.
    """
    rest, file = _take_flag(arguments, "config", "the run.json or manifest.json of an earlier run")
    recipe = None
    if name in TRAININGS:
        rest, recipe = _take_flag(rest, "recipe", "one that llm2clip recipes lists")
    groups = group_settings(cls, verb)
    nested = _nested(cls, groups)
    defaults = _defaults(name, cls, file, recipe)
    for typed, other in (("steps", "epochs"), ("epochs", "steps")):  # the one that is typed wins over the other, too
        if hasattr(defaults, other) and any(word.split("=")[0] == f"--{typed}" for word in rest):
            object.__setattr__(defaults, other, None)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            found = tyro.cli(
                nested,
                prog=f"llm2clip {name}",
                args=rest,
                default=None if defaults is None else _nest(nested, defaults),
                description=f"{inspect.getdoc(cls)}\n\n{CONFIG}{RECIPE if name in TRAININGS else ''}",
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            sys.stdout.write(f"\nFor example:\n  {verb.example}\n")
            raise
        raise UsageError(f"{_one_line(complaint.getvalue())} (llm2clip {name} --help lists the flags)") from None
    try:
        return cls(**{key: value for group in groups for key, value in vars(getattr(found, group)).items()})
    except UsageError as error:
        raise UsageError(f"{error} (llm2clip {name} --help lists the flags)") from None


def group_settings(cls: type[Any], verb: Verb) -> dict[str, list[dataclasses.Field[Any]]]:
    """The fields of a verb's settings by the groups of its help: those that matter first, then by their order."""
    fields = {one.name: one for one in dataclasses.fields(cls)}
    main = verb.main.split()
    groups = {"main": [fields[name] for name in main]} if main else {"verb": list(fields.values())}
    title_of = {first: title for title, first in verb.groups.items()}
    title = ""
    for name, one in fields.items():
        title = title_of.get(name, title)
        if main and name not in main:
            groups.setdefault(title, []).append(one)
    return groups


def _nested(cls: type[Any], groups: dict[str, list[dataclasses.Field[Any]]]) -> type[Any]:
    """A dataclass of dataclasses, one a group, which tyro shows as groups."""
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    sections = []
    for title, fields in groups.items():
        members = [
            (
                one.name,
                Annotated[hints[one.name], tyro.conf.arg(help=docs[one.name], **_left_open(one, hints[one.name]))],
                dataclasses.field(default=one.default, default_factory=one.default_factory),  # type: ignore[call-overload]
            )
            for one in fields
        ]
        sections.append((title, dataclasses.make_dataclass(title, members, kw_only=True)))
    return dataclasses.make_dataclass(cls.__name__, sections)


def _left_open(one: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """How help shows a setting that may be left out: by the type of what is given, without "(default: None)"."""
    factory = one.default_factory
    bare = one.default is factory is dataclasses.MISSING  # of these the parser takes several positional ones for empty
    empty = one.default in (None, ()) or (factory is not dataclasses.MISSING and not factory())
    if not empty and not (bare and "Positional" in str(one.type)):
        return {}
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    kinds = [kind for kind in typing.get_args(plain) if kind is not type(None)]
    optional = one.default is None and len(kinds) == 1 and isinstance(kinds[0], type)
    shown = {"metavar": kinds[0].__name__.upper()} if optional else {}
    return {**shown, "help_behavior_hint": lambda value: "" if value in ("None", "") else f"(default: {value})"}


def _nest(nested: type[Any], config: Any) -> Any:
    """A config in the form of `_nested`."""
    parts = {group.name: group.type for group in dataclasses.fields(nested)}
    values = vars(config)
    return nested(
        **{
            name: part(**{one.name: values[one.name] for one in dataclasses.fields(part)})  # type: ignore[arg-type,operator]
            for name, part in parts.items()
        }
    )


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The docstring under each field of a dataclass and of those it inherits from."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for before, after in itertools.pairwise(body):
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = inspect.cleandoc(ast.literal_eval(after.value))
                docs[ast.unparse(before.target)] = re.sub(r"\n(?![\n ])", " ", text)  # tables keep their lines
    return docs


def _one_line(box: str) -> str:
    """The parser's framed complaint as one line: its sections without frame, help texts and pointers.

    The frame is drawn with hyphens where stdout is not UTF-8; its first line is its title.
    """
    text = "\n".join(line.strip("│╰╯ ") for line in box.splitlines()[1:])
    sections = [" ".join(section.split()) for section in re.split(r"(?m)^[─-]{3,}$", text)]
    kept = [part for part in sections if part and not part.startswith(("For full helptext", "Argument helptext"))]
    return re.sub(r"Error parsing [A-Z]\w*: ", "", "; ".join(kept))


def _defaults(verb: str, cls: type[Any], file: str | None, recipe: str | None) -> Any | None:
    """The settings that flags are given beside."""
    if recipe is None:
        return None if file is None else from_file(cls, file)
    if file is not None:
        raise UsageError(f"--config {file} and --recipe {recipe} exclude each other; give one")
    settings = settings_of(recipe, verb)
    if settings is None:
        raise UsageError(f"--recipe {recipe} says nothing of {verb}; leave it out (llm2clip recipes {recipe})")
    return settings


def _take_flag(arguments: list[str], flag: str, value: str) -> tuple[list[str], str | None]:
    """`arguments` without `--flag VALUE` (or `--flag=VALUE`), and the value."""
    rest: list[str] = []
    found = None
    words = iter(arguments)
    for word in words:
        if word == f"--{flag}":
            found = next(words, None)
            if found is None:
                raise UsageError(f"--{flag} needs a value: {value}")
        elif word.startswith(f"--{flag}="):
            found = word.removeprefix(f"--{flag}=")
        else:
            rest.append(word)
    return rest, found
