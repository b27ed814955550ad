"""Tensors in several files: any block can be read, also across files; a part that is missing is found."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from llm2clip.errors import ArtifactError
from llm2clip.student.pieces import Pieces, file_name, write_pieces

WHOLE = torch.arange(30).reshape(5, 6)


def write(folder, parts, num_files) -> None:
    for number, (offset, part) in enumerate(parts):
        place = {"x": json.dumps([offset, list(WHOLE.shape)])}
        save_file({"x": part.contiguous()}, folder / file_name(number, num_files), place)


@pytest.fixture
def pieces(tmp_path) -> Pieces:
    """Cut both ways, as two meshes of processes would."""
    cuts = [((0, 0), WHOLE[:3, :4]), ((0, 4), WHOLE[:3, 4:]), ((3, 0), WHOLE[3:, :4]), ((3, 4), WHOLE[3:, 4:])]
    write(tmp_path, cuts, 4)
    return Pieces(tmp_path, 4)


def test_the_whole_and_blocks_across_files(pieces) -> None:
    assert pieces.names("") == ["x"] and pieces.shape("x") == (5, 6) and pieces.shape("y") is None
    assert torch.equal(pieces.read("x"), WHOLE)
    assert torch.equal(pieces.read("x", (2, 1), (2, 5)), WHOLE[2:4, 1:6])
    assert torch.equal(pieces.read("x", (4, 5), (1, 1)), WHOLE[4:, 5:])
    nothing = pieces.read("x", (5, 0), (0, 6))
    assert nothing.shape == (0, 6) and nothing.dtype == WHOLE.dtype


def test_a_part_that_no_file_holds_is_found(tmp_path) -> None:
    write(tmp_path, [((0, 0), WHOLE[:2]), ((3, 0), WHOLE[3:])], 2)
    with pytest.raises(ArtifactError, match="x is not whole"):
        Pieces(tmp_path, 2).read("x")


def test_tensors_that_are_not_in_shards(tmp_path) -> None:
    save_file({"count": torch.tensor(7), "x": WHOLE}, tmp_path / file_name(0, 1))
    pieces = Pieces(tmp_path, 1)
    assert pieces.read("count").item() == 7 and pieces.shape("count") == ()
    assert torch.equal(pieces.read("x", (1, 2), (3, 3)), WHOLE[1:4, 2:5])


@pytest.mark.parametrize(("shards", "copies"), [(4, 1), (2, 2), (8, 1)])
def test_shards_on_a_mesh_are_written_once_and_read_in_others(tmp_path, shards: int, copies: int) -> None:
    """Rows that do not divide, processes without any, and copies of shards (HSDP), one process after another."""
    count = torch.tensor(3)
    for rank in range(shards * copies):
        with fake_process(rank, shards * copies):
            x = on_mesh(copies, shards)
            write_pieces(tmp_path / file_name(rank, shards * copies), {"x": x, "count": count}, first=rank == 0)
    pieces = Pieces(tmp_path, shards * copies)
    assert torch.equal(pieces.read("x"), WHOLE) and pieces.read("count") == 3
    for rank in range(3):
        with fake_process(rank, 3):
            x = on_mesh(1, 3)
            assert torch.equal(pieces.read_like("x", x), x.to_local())


@contextlib.contextmanager
def fake_process(rank: int, world: int):
    """This process as one of several that cannot speak to each other."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def on_mesh(copies: int, shards: int) -> DTensor:
    """What a process of a mesh holds of the whole."""
    mesh = init_device_mesh("cpu", (copies, shards))
    parts = WHOLE.chunk(shards)
    own = mesh.get_coordinate()[1]
    local = parts[own] if own < len(parts) else WHOLE[:0]
    return DTensor.from_local(local, mesh, [Replicate(), Shard(0)], shape=WHOLE.shape, stride=WHOLE.stride())
