"""Tensors in several files: any block can be read, also across files; a part that is missing is found."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llm2clip.errors import ArtifactError
from llm2clip.student.pieces import Pieces, file_name

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
    assert pieces.read("x", (5, 0), (0, 6)).shape == (0, 6)


def test_a_part_that_no_file_holds_is_found(tmp_path) -> None:
    write(tmp_path, [((0, 0), WHOLE[:2]), ((3, 0), WHOLE[3:])], 2)
    with pytest.raises(ArtifactError, match="x is not whole"):
        Pieces(tmp_path, 2).read("x")


def test_tensors_that_are_not_in_shards(tmp_path) -> None:
    save_file({"count": torch.tensor(7), "x": WHOLE}, tmp_path / file_name(0, 1))
    pieces = Pieces(tmp_path, 1)
    assert pieces.read("count").item() == 7 and pieces.shape("count") == ()
    assert torch.equal(pieces.read("x", (1, 2), (3, 3)), WHOLE[1:4, 2:5])
