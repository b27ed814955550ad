"""A checkpoint's tensors in files: each process writes the shards it holds, and reads what it needs from all files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.tensor import DTensor

from llm2clip.artifacts import to_disk
from llm2clip.errors import ArtifactError


class _Piece(NamedTuple):
    """Part of a tensor in one file."""

    file: Any
    offset: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype


class Pieces:
    """The tensors of a checkpoint, read from its files as they are asked for.

    Args:
        folder: `checkpoints/step-N`.
        num_files: as `state.json` says.

    Raises:
        SafetensorError, OSError: if a file is missing or cut short.
    """

    def __init__(self, folder: Path, num_files: int) -> None:
        self.folder = folder
        self._pieces: dict[str, list[_Piece]] = {}
        for number in range(num_files):
            file = safe_open(folder / file_name(number, num_files), framework="pt")
            places = {name: json.loads(place) for name, place in (file.metadata() or {}).items()}
            for name in file.keys():  # noqa: SIM118  (a file is no dict)
                self._pieces.setdefault(name, []).append(_piece(file, name, places.get(name)))

    def names(self, prefix: str) -> list[str]:
        """The tensors whose name begins with `prefix`, sorted."""
        return sorted(name for name in self._pieces if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the whole tensor; None if there is none of this name."""
        return self._pieces[name][0].shape if name in self._pieces else None

    def read(self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """The block of `size` at `offset` of a tensor, by default all of it, on the CPU.

        Raises:
            ArtifactError: if the files do not hold all of it.
        """
        pieces = self._pieces[name]
        size = pieces[0].shape if size is None else tuple(size)
        offset = (0,) * len(size) if offset is None else tuple(offset)
        missing, block = math.prod(size), torch.empty(size, dtype=pieces[0].dtype)
        for piece in pieces:
            low = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, piece.offset, piece.size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            wanted = _slices(low, high, piece.offset)
            found = piece.file.get_slice(name)[wanted] if wanted else piece.file.get_tensor(name)
            block[_slices(low, high, offset)] = found
            missing -= found.numel()
        if missing:
            raise ArtifactError(f"checkpoint {self.folder} is damaged: {name} is not whole; delete it")
        return block

    def read_like(self, name: str, target: Tensor) -> Tensor:
        """Of the tensor `name`, what this process holds of `target`."""
        offset = _offset(target) if isinstance(target, DTensor) else None
        return self.read(name, offset, local_part(target).shape)


def _piece(file: Any, name: str, place: Sequence[Sequence[int]] | None) -> _Piece:
    """A tensor of a file, whole but where its place says otherwise."""
    part = file.get_slice(name)
    size = tuple(part.get_shape())
    offset, shape = ((0,) * len(size), size) if place is None else place
    dtype = (part[(slice(0, 0),) * len(size)] if size else file.get_tensor(name)).dtype
    return _Piece(file, tuple(offset), size, tuple(shape), dtype)


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def write_pieces(path: Path, tensors: Mapping[str, Tensor], *, first: bool) -> None:
    """Write what this process holds of `tensors`: its shards, and on the first process what is not in shards."""
    pieces, places = {}, {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            if not _is_copy(value) and value.to_local().numel():
                pieces[name], places[name] = value.to_local(), json.dumps([_offset(value), list(value.shape)])
        elif first:
            pieces[name] = value
    # None: safetensors writes what it cannot read for no tensors and empty metadata
    save_file({name: piece.to("cpu", copy=True).contiguous() for name, piece in pieces.items()}, path, places or None)
    to_disk(path)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _offset(tensor: DTensor) -> list[int]:
    """Where this process's shard lies in the whole."""
    data = create_default_local_save_plan({"": tensor}, is_coordinator=False).items[0].tensor_data
    assert data is not None  # it is a tensor
    return list(data.chunk.offsets)


def _is_copy(tensor: DTensor) -> bool:
    """Whether another process holds the same shard and writes it."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None  # this process is one of the mesh
    return any(
        number > 0 and placement.is_replicate() for number, placement in zip(coordinate, tensor.placements, strict=True)
    )


def file_name(number: int, num_files: int) -> str:
    """The name of one of a checkpoint's files."""
    return "state.safetensors" if num_files == 1 else f"state-{number:05d}-of-{num_files:05d}.safetensors"
