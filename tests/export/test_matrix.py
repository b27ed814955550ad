"""Teachers x towers x exports: every folder opens without llm2clip and gives the model's vectors; docs say which do."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest

from llm2clip.export.format import format_names
from tests.export import matrix
from tests.teacher.conftest import chat_llm  # noqa: F401  (a fixture)

DOCS = Path(__file__).parents[2] / "docs" / "matrix.md"
WRITE = "LLM2CLIP_WRITE_MATRIX"
"""An environment variable: write the table into docs/matrix.md instead of comparing with it."""
DEFAULT = [("an embedder (BERT)", "CLIP"), ("Llama", "MetaCLIP 2"), ("Llama", "LLM2CLIP-Openai-*")]
"""What the default suite tries of it, in the formats that need no extra."""


def documented() -> tuple[str, str, str]:
    """The page before the table, the table, and what comes behind it."""
    before, rest = DOCS.read_text(encoding="utf-8").split(matrix.BEGIN)
    table, behind = rest.split(matrix.END)
    return before, table, behind


@pytest.mark.ci
def test_three_pairs_without_llm2clip(tiny_llm: Path, chat_llm: Path, tmp_path: Path) -> None:  # noqa: F811
    forms = [name for name in format_names() if name not in ("onnx", "open-clip")]
    cells = matrix.run_matrix(DEFAULT, tmp_path, forms, tiny_llm=tiny_llm, chat_llm=chat_llm)
    assert cells == {pair: dict.fromkeys(forms, "ok") for pair in DEFAULT}


def test_the_page_has_every_pair_and_every_format() -> None:
    found = matrix.read_table(documented()[1])
    assert list(found) == matrix.PAIRS and len(set(matrix.PAIRS)) == len(matrix.TEACHERS) + len(matrix.TOWERS) - 1
    assert set(matrix.OPENERS) == set(format_names())
    for pair, cells in found.items():
        assert list(cells) == format_names(), pair
        for cell in cells.values():
            assert cell == "ok" or cell.startswith("open_clip "), "a gap, or a fault: not a limit of the format"


def test_a_table_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "version", lambda name: "1")
    cells = {("a", "b"): {"x": "ok", "y": "no. none"}, ("c", "b"): {"x": "no. none", "y": "nor here"}}
    assert matrix.read_table(matrix.as_table(cells, ["x", "y"], "2026-11-28")) == cells


@pytest.mark.slow
def test_every_pair_in_every_format(tiny_llm: Path, chat_llm: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("timm", "onnxruntime", "onnxscript", "open_clip"):
        pytest.importorskip(name)
    cells = matrix.run_matrix(matrix.PAIRS, tmp_path, format_names(), tiny_llm=tiny_llm, chat_llm=chat_llm)
    before, table, behind = documented()
    if WRITE in os.environ:
        table = matrix.as_table(cells, format_names(), datetime.date.today().isoformat())
        DOCS.write_text(f"{before}{matrix.BEGIN}\n{table}\n{matrix.END}{behind}", encoding="utf-8")
    assert matrix.read_table(table) == cells
