"""The rules of the house, held by tests: import direction, exported names, file sizes."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import re
from pathlib import Path

import pytest

import llm2clip

SOURCE = Path(llm2clip.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

# Of each folder the most lines, files, and lines of imports in a hundred ("": the files beside the folders; "*": all).
# A later capability adds its own row; no row is widened to pass.
SIZES = {
    # with the bundle, of export before, the journal of both trainings, the table of verbs, the evaluators' scores,
    # and what runs say of themselves before, while and after they learn
    # two towers are opened here, what few images and code for open_clip take, flags beside a recipe; a silent run lives
    "": (4_343, 27, 7.1),
    # 2,300 before nothing of a source could get lost and missing images were found; with caption views
    "data": (3_160, 19, 7.2),
    "teacher": (3_184, 17, 7.7),  # with adapters as teachers, and `--join`
    "bank": (2_780, 17, 8.5),
    # with released and finished students, towers that AutoModel does not list, Muon at a CPU's speed, named benchmarks
    "student": (5_391, 29, 7.4),
    "student/inheritance": (460, 3, 9),
    # with the page of images, its verdict and the baseline; since then named benchmarks, their forms, intervals, files
    "eval": (3_122, 23, 8.9),
    "eval/benchmarks": (930, 29, 15),  # one file each
    "eval/evaluators": (20, 3, 12),  # one file each
    "export": (902, 9, 13.1),  # with what push may say of this machine, what the Hub is asked for, a LLaVA's timm tower
    "export/formats": (610, 6, 15.1),  # a format's imports are inside its functions
    "recipes": (170, 3, 15),  # one file each
    "*": (25_021, 185, 8.2),
}
DOCSTRINGS = 17
"""The fewest lines of docstrings in a hundred, those under fields and constants included."""
FUNCTION, NINE_IN_TEN = 80, 25
"""The most lines of a function, docstring included, and of nine functions in ten."""

STAGES = {"data", "teacher", "bank", "student", "eval", "export", "search", "recipes"}
CORE = {"artifacts", "compat", "config", "cuts", "errors", "hub", "journal", "metrics", "parts", "progress"}
CORE |= {"few", "on_hub", "outlook", "protocols", "released", "same_settings", "scores"}
TOP = {"__init__", "__main__", "bundle", "cli", "flags", "open_clip", "opening", "pipeline", "two_towers", "verbs"}

# who may import whom, beside itself and core; the module names an edge allowed from that one file alone
ALLOWED = {
    "data": set(),
    "teacher": {"data"},
    "bank": {"data"},
    "student": {"data", "bank", "two_towers"},
    "eval": {"data", "two_towers"},
    "export": {"student", "bundle", "opening", "pipeline"},
    "bundle": {"teacher", "student"},
    "flags": {"verbs", "recipes"},
    "recipes": {"teacher", "student"},
    "open_clip": {"pipeline"},
    "two_towers": {"data"},
    "opening": {"teacher", "student"},
    "pipeline": {"data", "teacher", "student", "bundle", "opening"},
}
SPECIAL = {
    ("bank", "teacher"): {"llm2clip.teacher.model"},
    ("student", "bank"): {"llm2clip.bank.reader"},
    ("bank", "eval"): {"llm2clip.eval.benchmarks", "llm2clip.eval.named"},
    ("student", "eval"): {"llm2clip.eval.benchmarks", "llm2clip.eval.named"},
}
ENTRY_POINTS = {("eval", "pipeline"): "eval/models.py", ("eval", "opening"): "eval/models.py"}

# imports that close a circle, each with its reason
CIRCLES: set[tuple[str, str]] = set()

# where a file is tested that has no test_NAME.py of its own; settings and tables without behaviour have None
TESTED_IN: dict[str, str | None] = {
    "__main__.py": "test_cli.py",
    "bank/fill.py": "bank/test_processes.py",
    "bank/reuse.py": "bank/test_build.py",
    "bundle.py": "export/test_towers.py",
    "two_towers.py": "eval/test_encoders.py",
    "data/config.py": "data/test_source.py",
    "data/sample.py": None,
    "eval/annotations.py": "eval/test_benchmarks.py",
    "eval/config.py": "eval/test_run.py",
    "eval/models.py": "eval/test_run.py",
    "eval/beside.py": "eval/test_more_benchmarks.py",
    "eval/tables.py": "eval/test_report.py",
    "eval/named.py": "eval/test_benchmarks.py",
    "eval/places.py": "eval/test_benchmarks.py",
    "eval/writing.py": "eval/test_more_benchmarks.py",
    "eval/datasets.py": "eval/test_parts.py",
    "eval/encode.py": "eval/test_parts.py",
    "eval/verdict.py": "eval/test_report.py",
    "eval/evaluators/retrieval.py": "test_scores.py",
    "eval/evaluators/text_retrieval.py": "test_scores.py",
    "parts.py": "export/test_run.py",
    "export/card.py": "export/test_run.py",
    "export/check.py": "export/test_run.py",
    "export/config.py": "export/test_run.py",
    "export/format.py": "export/test_run.py",
    "export/timm_tokens.py": "llava/test_make_llava.py",
    "export/formats/onnx.py": "export/test_onnx.py",
    "export/formats/open_clip.py": "export/test_open_clip.py",
    "export/formats/sentence_transformers.py": "export/test_run.py",
    "export/formats/tower.py": "export/test_towers.py",
    "export/formats/transformers.py": "export/test_towers.py",
    "flags.py": "test_cli.py",
    "protocols.py": "test_pipeline.py",
    "recipes/inherit.py": "recipes/test_recipes.py",
    "recipes/paper.py": "recipes/test_recipes.py",
    "released.py": "student/test_official.py",
    "same_settings.py": "test_artifacts.py",
    "student/accelerator.py": "student/test_session.py",
    "student/adaptor_module.py": "test_pipeline.py",
    "student/gather.py": "student/test_loss.py",
    "student/tower_module.py": "export/test_towers.py",
    "student/trainable.py": "student/test_model.py",
    "teacher/joined_module.py": "teacher/test_join.py",
    "teacher/reach.py": "teacher/test_architectures.py",
    "teacher/trainer.py": "teacher/test_train.py",
    "verbs.py": "test_cli.py",
}

# a card and how its files are read, one file each
TESTED_IN |= {
    file.relative_to(SOURCE).as_posix(): "eval/test_benchmarks.py" for file in SOURCE.glob("eval/benchmarks/[a-z]*.py")
}

# names with an underscore that are no other library's secrets
PYTHON = {*dir(type), *dir(list), "__all__", "__enter__", "__exit__", "__file__", "__getattr__", "__main__", "__next__"}
PYTHON |= {"__del__", "__path__", "__post_init__", "__setstate__", "__version__"}
PROTOCOLS = {"__arrow_c_array__", "_replace", "_asdict", "_fields"}  # Arrow's, and a NamedTuple's own
KNOWN = {
    # hooks that transformers asks a model to define; the file is copied beside a student and cannot import compat
    "student/model.py": {
        "_init_weights",
        "_no_split_modules",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_sdpa",
    },
    "data/files.py": {"_data_files", "_indices_data_files", "_indices_files"},  # keys of a saved dataset's state.json
    "teacher/fingerprint.py": {"_name_or_path"},  # a key of config.json
}


def imports_of(file: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [each.value for each in node.args if isinstance(each, ast.Constant)]
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
            names = {module, module.rpartition(".")[0]}  # of what is imported from a package, the package
            assert names & SPECIAL[edge], f"{relative} imports {module}; only {SPECIAL[edge]} are allowed"
        elif edge in ENTRY_POINTS:
            assert str(relative) == ENTRY_POINTS[edge], f"{relative} imports {module}"
        else:
            assert target in allowed, f"{relative} imports {module}; {own} may import {sorted(allowed)}"


def name_of(file: Path) -> str:
    return ".".join(["llm2clip", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def folder_of(file: Path) -> str:
    return file.relative_to(SOURCE).parent.as_posix().removeprefix(".")


def num_lines(nodes: list[ast.AST]) -> int:
    return sum(node.end_lineno - node.lineno + 1 for node in nodes)


@pytest.mark.parametrize("folder", SIZES)
def test_a_folder_stays_small(folder: str) -> None:
    lines, files, share = SIZES[folder]
    own = [file for file in FILES if folder in ("*", folder_of(file))]
    assert 0 < len(own) <= files
    total = sum(file.read_text(encoding="utf-8").count("\n") for file in own)
    assert total <= lines
    imports = [node for file in own for node in ast.walk(TREES[file]) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert 100 * num_lines(imports) / total <= share


def test_the_tests_of_every_file_are_found_by_its_name() -> None:
    tests = Path(__file__).parent
    for file in FILES:
        relative = file.relative_to(SOURCE)
        has_own = (tests / relative.parent / f"test_{relative.name}").exists() or relative.name == "__init__.py"
        assert has_own == (relative.as_posix() not in TESTED_IN), f"{relative}: give it a test of its name, or a row"
    assert all(place is None or (tests / place).exists() for place in TESTED_IN.values())
    for place in tests.rglob("test_*.py"):
        assert ast.get_docstring(ast.parse(place.read_text(encoding="utf-8"))), f"{place} does not say what it tests"


def test_every_folder_has_its_row() -> None:
    assert {folder_of(file) for file in FILES} | {"*"} == set(SIZES)


@pytest.mark.parametrize("folder", SIZES)
def test_no_circle(folder: str) -> None:
    own = {name_of(file): file for file in FILES if folder in ("*", folder_of(file))}
    graph = {name: (set(imports_of(file)) & set(own)) - {name} for name, file in own.items()}
    for importer, imported in CIRCLES:
        if folder == "*":
            assert imported in graph[importer], f"{importer} no longer imports {imported}: take it out of CIRCLES"
        graph.get(importer, set()).discard(imported)
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("name", ["model", "tower", "adaptor"])
def test_what_is_copied_into_a_students_folder_needs_no_llm2clip(name: str) -> None:
    """AutoModel runs these files where llm2clip is not installed; they may import each other alone."""
    own = {"llm2clip.student.tower", "llm2clip.student.adaptor"}
    assert set(imports_of(SOURCE / "student" / f"{name}.py")) <= own


def test_enough_is_explained() -> None:
    strings = [
        statement
        for tree in TREES.values()
        for node in ast.walk(tree)
        for statement in (node.body if isinstance(getattr(node, "body", None), list) else [])
        if isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str)
    ]
    total = sum(file.read_text(encoding="utf-8").count("\n") for file in FILES)
    assert 100 * num_lines(strings) / total >= DOCSTRINGS


def test_a_function_fits_a_screen() -> None:
    lengths = sorted(
        (num_lines([node]), name_of(file), node.name)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert lengths[-1][0] <= FUNCTION, f"{lengths[-1]} is too long"
    assert lengths[len(lengths) * 9 // 10][0] <= NINE_IN_TEN


def is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_+[A-Za-z]\w*", name)) and name not in PYTHON | PROTOCOLS


def named(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The names that a file's functions, classes, variables and own attributes have, and those that it reads."""
    made, read = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (made if is_own and isinstance(node.ctx, ast.Store) else read).add(node.attr)
    return made, read


MADE, READ = (set().union(*names) for names in zip(*map(named, TREES.values()), strict=True))


NAME = r"_\w+|[A-Za-z]\w*(\.\w+)+"
"""A name, or a module's with dots; no end of a file name."""


def private_names(tree: ast.AST) -> set[str]:
    """Private names of other libraries in a file: read, set, imported, given as arguments or defined as their hooks."""
    found = {name for name in named(tree)[0] if is_private(name) and name not in READ}  # who reads it is no one here
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found |= {node.attr} - MADE
            if node.attr == "__module__" and not isinstance(node.ctx, ast.Load):
                found.add("a set __module__")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            parts = [*(getattr(node, "module", None) or "").split("."), *(alias.name for alias in node.names)]
            found |= {part for name in parts for part in name.split(".")} - {"__future__"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(NAME, node.value):
            found |= set(node.value.split(".")) - MADE  # as getattr and import_module take it
        elif isinstance(node, ast.keyword | ast.arg) and node.arg:
            found.add(node.arg)
    return {name for name in found if is_private(name) and not name.startswith("_llm2clip_")} | found & {
        "a set __module__"
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_private_names_of_other_libraries_are_in_compat_alone(file: Path) -> None:
    relative = file.relative_to(SOURCE).as_posix()
    if relative != "compat.py":
        assert private_names(TREES[file]) == KNOWN.get(relative, set())


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("accelerator._models.clear()", "_models"),
        ("arguments._n_gpu = 1", "_n_gpu"),
        ("list(tensor.__create_chunk_list__())", "__create_chunk_list__"),
        ("getattr(config, '_attn_implementation')", "_attn_implementation"),
        ("from torch._utils import x", "_utils"),
        ("from torch import _C", "_C"),
        ("import torch._dynamo", "_dynamo"),
        ("importlib.import_module('torch._dynamo')", "_dynamo"),
        ("trainer.save_model(_internal_call=True)", "_internal_call"),
        ("def save_model(self, _internal_call=False): ...", "_internal_call"),
        ("class A(Trainer):\n def _load_from_checkpoint(self): ...", "_load_from_checkpoint"),
        ("class A(PreTrainedModel):\n _supports_sdpa = True", "_supports_sdpa"),
        ("Joined.__module__ = 'joined_module'", "a set __module__"),
    ],
)
def test_a_private_name_is_found(line: str, name: str) -> None:
    assert private_names(ast.parse(line)) == {name}


def test_what_is_pythons_is_not_private() -> None:
    source = "class A:\n def __init__(self):\n  super().__init__(type(self).__name__)\n  pair._replace(a=lambda _: 1)"
    assert not private_names(ast.parse(source))


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
