"""What lies beside the package keeps up with it: names it imports are there, tiny benchmarks run to their end."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BESIDE = sorted(path for name in ("benchmarks", "demo", "examples", "tools") for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_of_the_package_is_there(path: Path) -> None:
    """Those within functions, too, which nothing else would miss before they are called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("llm2clip", "demo"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):  # a module of it, then
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.ci
@pytest.mark.parametrize("name", ["beside", "encode", "loader", "loss", "step"])
def test_a_tiny_benchmark_measures_all_that_needs_no_peer(name: str) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    rows = list(benchmark.run([benchmark.SETTINGS["tiny"]], "cpu", None))
    missing = {row["name"]: row["reason"] for row in rows if row["value"] is None}
    assert len(rows) > len(missing), missing
    assert all("not installed" in why or "no GPU" in why for why in missing.values()), missing
