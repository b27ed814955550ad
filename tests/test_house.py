"""The rules of the house, held by tests: import direction, exported names, file sizes."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
from pathlib import Path

import pytest

import llm2clip

SOURCE = Path(llm2clip.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
STAGES = {"data", "teacher", "bank", "student", "eval", "export", "search", "recipes"}
CORE = {"artifacts", "compat", "config", "errors", "hub", "metrics", "progress", "protocols"}
TOP = {"__init__", "__main__", "cli", "opening", "pipeline"}

# who may import whom, beside itself and core; the module names an edge allowed from that one file alone
ALLOWED = {
    "data": set(),
    "teacher": {"data"},
    "bank": {"data"},
    "student": {"data", "bank"},
    "eval": {"data"},
    "export": {"teacher", "student", "opening", "pipeline"},
    "opening": {"teacher", "student"},
    "pipeline": {"data", "teacher", "student", "opening"},
}
SPECIAL = {("bank", "teacher"): "llm2clip.teacher.model", ("student", "bank"): "llm2clip.bank.reader"}
ENTRY_POINTS = {("eval", "pipeline"): "eval/run.py", ("eval", "opening"): "eval/run.py"}


# the most lines and files a folder may have; a new capability adds its own row, no row is widened to pass
SIZES = {"data": (2_300, 15)}


def imports_of(file: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ["llm2clip", *file.relative_to(SOURCE).parent.parts]
                module = ".".join([*package[: len(package) - node.level + 1], *([module] if module else [])])
            # what is imported from a package may be a module of it
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)] if is_package(module) else [module]
    return [name for name in names if name.startswith("llm2clip.")]


def is_package(module: str) -> bool:
    return SOURCE.joinpath(*module.split(".")[1:], "__init__.py").exists()


def part(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_one_way(file: Path) -> None:
    relative = file.relative_to(SOURCE)
    own = relative.parts[0].removesuffix(".py")
    if own in {"__init__", "__main__", "cli", "recipes"}:
        return
    allowed = CORE | {"__version__", own} | ALLOWED.get(own, set())
    for module in imports_of(file):
        target = part(module)
        edge = (own, target)
        if edge in SPECIAL:
            assert module == SPECIAL[edge], f"{relative} imports {module}; only {SPECIAL[edge]} is allowed"
        elif edge in ENTRY_POINTS:
            assert str(relative) == ENTRY_POINTS[edge], f"{relative} imports {module}"
        else:
            assert target in allowed, f"{relative} imports {module}; {own} may import {sorted(allowed)}"


@pytest.mark.parametrize("folder", SIZES)
def test_a_folder_stays_small(folder: str) -> None:
    lines, files = SIZES[folder]
    texts = [file.read_text(encoding="utf-8") for file in FILES if file.relative_to(SOURCE).parts[0] == folder]
    assert 0 < len(texts) <= files
    assert sum(text.count("\n") for text in texts) <= lines


@pytest.mark.parametrize("folder", SIZES)
def test_no_circle_inside_a_folder(folder: str) -> None:
    own = [file for file in FILES if file.relative_to(SOURCE).parts[0] == folder]
    names = {file: ".".join(["llm2clip", *file.relative_to(SOURCE).with_suffix("").parts]) for file in own}
    graph = {names[file]: set(imports_of(file)) & set(names.values()) for file in own}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_every_file_has_a_place() -> None:
    places = {file.relative_to(SOURCE).parts[0].removesuffix(".py") for file in FILES}
    assert places <= STAGES | CORE | TOP


def test_every_public_name_can_be_imported() -> None:
    for name in llm2clip.__all__:
        named = {}
        exec(f"from llm2clip import {name}", named)  # a subpackage of the same name would come in its place
        assert not inspect.ismodule(named[name]), name
    assert llm2clip.__all__ == sorted(llm2clip.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = llm2clip.Nope


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_file_says_its_idea_and_stays_small(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text)), f"{file} has no docstring"
    assert text.count("\n") <= 400, f"{file} has {text.count(chr(10))} lines; split it by idea"


def test_no_public_module_needs_a_gpu_or_an_extra_to_be_imported() -> None:
    for file in FILES:
        name = ".".join(["llm2clip", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
        if not name.endswith("__main__"):
            importlib.import_module(name)
