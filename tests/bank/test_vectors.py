"""The files of vectors: where rows lie, when a shard is whole, what no vector may hold, what is refused as damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip.bank.dtypes import DTYPES, STORED, num_blocks, pack
from llm2clip.bank.reader import Bank
from llm2clip.bank.vectors import Layout, ShardBuffer, checksum
from llm2clip.errors import ArtifactError, LLM2CLIPError


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path, num_rows=10, shard_rows=4, dtype="float16", dim=3)
    layout.prepare()
    return layout


def filled(layout: Layout, shard: int, value: float = 1.0) -> ShardBuffer:
    buffer = ShardBuffer(layout, shard)
    buffer.put(np.arange(len(buffer.vectors)), (np.full_like(buffer.vectors, value), None))
    return buffer


def test_rows_are_cut_into_shards(layout: Layout) -> None:
    assert [list(layout.rows(shard)) for shard in range(layout.num_shards)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert layout.num_bytes() == 60
    assert Layout(layout.folder, 8, 4, "float16", 3).num_shards == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 384, 2048])
def test_shards_in_any_order_are_one_array(dtype: str, dim: int, tmp_path: Path) -> None:
    layout = Layout(tmp_path, 1477, 700, dtype, dim)
    layout.prepare()
    draw = np.random.default_rng(0)
    whole = {
        name: draw.integers(0, 100, (1477, *shape[1:])).astype(kind) for name, (kind, shape) in layout.arrays.items()
    }
    assert set(whole) == {"vectors", "tokens", *(["scale"] if dtype == "int8" else [])}
    for shard in (2, 0, 1):
        buffer, rows = ShardBuffer(layout, shard), layout.rows(shard)
        part = {name: array[rows.start : rows.stop] for name, array in whole.items()}
        buffer.put(np.arange(len(rows)), (part["vectors"], part.get("scale")))
        buffer.tokens[:] = part["tokens"]
        facts = buffer.write()
        assert facts["sha256"] == {n: hashlib.sha256(array.tobytes()).hexdigest() for n, array in part.items()}
        assert (facts["first"], facts["rows"], facts["tokens"]) == (rows.start, len(rows), int(part["tokens"].sum()))
    for name, array in whole.items():
        np.save(tmp_path / "plain.npy", array)
        assert layout.path(name).read_bytes() == (tmp_path / "plain.npy").read_bytes()
        np.testing.assert_array_equal(layout.open(name), array)
        assert checksum(array[::2]) == hashlib.sha256(array[::2].tobytes()).hexdigest()
    assert dtype != "int8" or whole["scale"].shape == (1477, num_blocks(dim))


def test_a_shard_is_whole_when_its_facts_are_there(layout: Layout) -> None:
    assert not layout.is_whole(1)
    facts = filled(layout, 1).write()
    assert layout.is_whole(1) and not layout.is_whole(0) and not layout.is_whole(2)
    assert json.loads((layout.folder / "vectors" / "00001.json").read_text()) == facts
    np.testing.assert_array_equal(layout.open("vectors")[:, 0], [0] * 4 + [1] * 4 + [0] * 2)


@pytest.mark.parametrize("lost", ["vectors", "tokens"])
def test_no_shard_is_whole_when_an_array_was_lost(lost: str, layout: Layout) -> None:
    for shard in range(3):
        filled(layout, shard).write()
    layout.prepare()  # nothing is lost
    assert all(map(layout.is_whole, range(3))) and layout.open("vectors").all()
    layout.path(lost).unlink()
    layout.prepare()
    assert not any(map(layout.is_whole, range(3))) and not layout.open(lost).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_vector_that_is_no_number_stops_the_run(dtype: str, tmp_path: Path) -> None:
    buffer = ShardBuffer(Layout(tmp_path, 3, 3, dtype, 2), 0)
    vectors, scale = pack(torch.tensor([[1.0, 2.0], [1e30, float("inf")], [0.0, 0.0]]), dtype)
    buffer.put(np.arange(3), (vectors.numpy().view(STORED[dtype]), None if scale is None else scale.numpy()))
    with pytest.raises(LLM2CLIPError, match=r"caption 'the one' overflows .* precision='fp32' and dtype='float32'"):
        buffer.check(lambda row: ["a", "the one", "b"][row])


def test_the_caption_of_a_vector_that_is_no_number_is_found_in_a_later_shard(layout: Layout) -> None:
    buffer = filled(layout, 2)
    buffer.vectors[1, 2] = np.nan
    with pytest.raises(LLM2CLIPError, match="the vector of caption 'row 9' overflows float16"):
        buffer.check(lambda row: f"row {row}")


def test_rows_are_on_the_disk_before_their_facts_say_so(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, renames: dict[str, list[str]]
) -> None:
    """And the arrays' files, before they have their names."""
    flushed: list[tuple[int, int, int]] = []
    fsync, replace = os.fsync, os.replace

    def state(facts: os.stat_result) -> tuple[int, int, int]:
        return facts.st_ino, facts.st_size, facts.st_mtime_ns

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(state(os.fstat(descriptor)))

    def rename(source: Path, target: Path) -> None:
        if Path(target).suffix == ".json":
            assert all(state(layout.path(name).stat()) in flushed for name in layout.arrays)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    filled(layout, 0).write()
    assert renames == {"00000.json": []}
    layout.path("tokens").unlink()
    layout.prepare()
    assert renames == {"00000.json": [], "vectors.npy": [], "tokens.npy": []}


@pytest.mark.parametrize("call", range(3))
def test_a_full_disk_leaves_no_facts(call: int, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [call]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        filled(layout, 0).write()
    assert sorted(path.name for path in (layout.folder / "vectors").iterdir()) == ["tokens.npy", "vectors.npy"]


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "nonsense":
        path.write_bytes(b"nonsense")
    elif how == "a header alone":
        path.write_bytes(b"\x93NUMPY" + b"\x00" * 200)
    elif how == "cut short":
        path.write_bytes(data[:-1])
    elif how == "too long":
        path.write_bytes(data + b"x")
    elif how == "another shape":
        np.save(path, np.load(path)[1:])
    elif how == "another dtype":
        np.save(path, np.load(path).astype(np.float32))


@pytest.mark.parametrize("name", ["vectors", "tokens"])
@pytest.mark.parametrize(
    "how", ["empty", "nonsense", "a header alone", "cut short", "too long", "another shape", "another dtype"]
)
def test_a_damaged_array_is_refused_before_it_is_read(how: str, name: str, layout: Layout) -> None:
    spoil(layout.path(name), how)
    with pytest.raises(ArtifactError, match=rf"{name}\.npy is damaged: it holds .* bytes, expected .*; delete it"):
        layout.open(name)
    if name == "vectors":
        with pytest.raises(ArtifactError, match="is damaged"):
            filled(layout, 0).write()


def test_a_missing_array_is_one_line(layout: Layout) -> None:
    layout.path("tokens").unlink()
    with pytest.raises(ArtifactError, match=r"tokens\.npy is missing; type the command that made its bank again"):
        layout.open("tokens")


def test_a_bank_larger_than_half_the_memory_is_read_without_reading_ahead(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the system takes no such advice, as on Windows, it is read all the same."""
    whole = bank.vectors(range(120))
    asked: list[str] = []

    def sysconf(name: str) -> int:
        asked.append(name)
        return 1

    monkeypatch.setattr(os, "sysconf", sysconf)
    np.testing.assert_array_equal(Bank.open(bank.folder).vectors(range(120)), whole)
    assert asked == ["SC_PAGE_SIZE", "SC_PHYS_PAGES"] * 2
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(mmap, "MADV_RANDOM")
    np.testing.assert_array_equal(Bank.open(bank.folder).vectors(range(120)), whole)
