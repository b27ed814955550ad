"""Shards: where rows lie, when a shard is whole, what no vector may hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llm2clip.bank.reader import Bank
from llm2clip.bank.shards import Layout, ShardBuffer, link_shards, plan_layout, shard_facts
from llm2clip.errors import LLM2CLIPError


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "vectors").mkdir()
    return plan_layout(tmp_path, 10, 4, "float16", 3, base=None)


def filled(layout: Layout, shard: int, value: float = 1.0) -> ShardBuffer:
    buffer = ShardBuffer(layout, shard)
    buffer.put(np.arange(len(buffer.vectors)), (np.full_like(buffer.vectors, value), None))
    return buffer


def test_rows_are_cut_into_shards(layout: Layout, bank: Bank) -> None:
    assert layout.starts == (0, 4, 8, 10)
    assert [list(layout.rows(shard)) for shard in range(layout.num_shards)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert layout.num_bytes() == 60
    longer = plan_layout(layout.folder, 150, 16, "float16", 32, base=bank)
    assert longer.starts == (0, 16, 32, 48, 64, 80, 96, 112, 120, 136, 150)


def test_a_shard_is_whole_when_its_facts_and_files_are(layout: Layout) -> None:
    assert shard_facts(layout, 1) is None
    facts = filled(layout, 1).write()
    assert shard_facts(layout, 1) == facts
    assert facts["files"]["vectors"]["file"] == "vectors/00001.npy"
    with layout.path(1, "vectors").open("ab") as file:
        file.write(b"x")
    assert shard_facts(layout, 1) is None
    filled(layout, 1).write()
    layout.path(1, "tokens").unlink()
    assert shard_facts(layout, 1) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_vector_that_is_no_number_stops_the_run(dtype: str, tmp_path: Path) -> None:
    import torch

    from llm2clip.bank.dtypes import STORED, pack

    layout = plan_layout(tmp_path, 3, 3, dtype, 2, base=None)
    buffer = ShardBuffer(layout, 0)
    vectors, scale = pack(torch.tensor([[1.0, 2.0], [1e30, float("inf")], [0.0, 0.0]]), dtype)
    buffer.put(np.arange(3), (vectors.numpy().view(STORED[dtype]), None if scale is None else scale.numpy()))
    with pytest.raises(LLM2CLIPError, match=r"caption 'the one' overflows .* precision='fp32' and dtype='float32'"):
        buffer.check(lambda row: ["a", "the one", "b"][row])


def test_the_caption_of_a_vector_that_is_no_number_is_found_in_a_later_shard(layout: Layout) -> None:
    buffer = filled(layout, 2)
    buffer.vectors[1, 2] = np.nan
    with pytest.raises(LLM2CLIPError, match="the vector of caption 'row 9' overflows float16"):
        buffer.check(lambda row: f"row {row}")


def test_files_of_a_shard_are_on_the_disk_and_its_facts_come_last(
    layout: Layout, bank: Bank, monkeypatch: pytest.MonkeyPatch, renames: dict[str, list[str]]
) -> None:
    filled(layout, 0).write()
    assert set(renames) == {"00000.npy", "00000.tokens.npy", "00000.json"} and list(renames)[-1] == "00000.json"
    assert not any(renames.values())
    renames.clear()
    monkeypatch.setattr(os, "link", _no_links)  # a copy is no less a file of this bank
    (layout.folder / "copy" / "vectors").mkdir(parents=True)
    link_shards(plan_layout(layout.folder / "copy", bank.num_rows, 16, "float16", 32, base=bank), bank)
    assert len(renames) == 3 * 8 and not any(renames.values())


def test_linked_shards_are_the_same_files(bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linked", "copied"):
        (tmp_path / name / "vectors").mkdir(parents=True)
        layout = plan_layout(tmp_path / name, bank.num_rows, 16, "float16", 32, base=bank)
        if name == "copied":
            monkeypatch.setattr(os, "link", _no_links)
        link_shards(layout, bank)
        assert all(shard_facts(layout, shard) for shard in range(8))
        facts = json.loads(layout.facts_path(0).read_text())
        assert facts == json.loads((bank.folder / "vectors" / "00000.json").read_text())
        same = layout.path(0, "vectors").samefile(bank.folder / "vectors" / "00000.npy")
        assert same == (name == "linked")


def _no_links(*arguments: object) -> None:
    raise OSError("Operation not supported")
