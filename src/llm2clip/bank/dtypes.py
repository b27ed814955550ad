"""How a vector is stored: float32, float16, bfloat16 (as uint16), or int8 with a float32 scale a row and block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "float32", "bfloat16", "int8")
STORED = {"float16": "float16", "float32": "float32", "bfloat16": "uint16", "int8": "int8"}
"""The numpy dtype of the file that holds vectors of a dtype."""
INT8_MAX = 127
MIN_BLOCK, MAX_BLOCK = 16, 64
"""Dimensions of a row that share an int8 scale. LLMs have a few dimensions tens of times larger than the others; with
one scale a row those would take the steps of all others away (cosine 0.999 instead of 0.99995)."""
Stored = tuple[NDArray[Any], NDArray[np.float32] | None]
"""Vectors `[n, T]` as stored, and int8's scales `[n, T / block]`."""


def num_blocks(dim: int) -> int:
    """Scales of an int8 row of `dim` dimensions: as few as make equal blocks of 16 to 64, or one if none do.

    >>> num_blocks(4096), num_blocks(384), num_blocks(100), num_blocks(127)
    (64, 6, 2, 1)
    """
    return next((count for count in range(-(-dim // MAX_BLOCK), dim // MIN_BLOCK + 1) if dim % count == 0), 1)


def row_bytes(dtype: str, dim: int) -> int:
    """Bytes of one stored vector, its scales included.

    >>> row_bytes("float16", 4096), row_bytes("int8", 4096)
    (8192, 4352)
    """
    return np.dtype(STORED[dtype]).itemsize * dim + (4 * num_blocks(dim) if dtype == "int8" else 0)


def read_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype in which a reader gets vectors stored as `dtype`; numpy has no bfloat16, and int8 alone says little."""
    return np.dtype("float16" if dtype == "float16" else "float32")


def pack(vectors: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Vectors `[N, T]` of any float dtype as they are stored, on the device they are on, and int8's scales.

    int8 is `round(x / scale)` with `scale = max|x| / 127` of each block of a row; bfloat16 keeps its bits as int16.
    """
    import torch

    if dtype == "int8":
        blocks = vectors.float().unflatten(1, (num_blocks(vectors.shape[1]), -1))
        scale = blocks.abs().amax(dim=2) / INT8_MAX
        steps = blocks / torch.where(scale > 0, scale, 1.0)[:, :, None]
        return steps.round().to(torch.int8).flatten(1), scale
    if dtype == "bfloat16":
        return vectors.to(torch.bfloat16).view(torch.int16), None
    return vectors.to(getattr(torch, dtype)), None


def unpack(stored: NDArray[Any], scale: NDArray[np.float32] | None, dtype: str) -> NDArray[Any]:
    """Stored rows `[N, T]` as a reader gets them: float16 as it is, all others as float32.

    >>> unpack(np.array([[127, -64]], np.int8), np.array([[0.5]], np.float32), "int8")
    array([[ 63.5, -32. ]], dtype=float32)
    """
    if dtype == "int8":
        assert scale is not None
        blocks = stored.reshape(*scale.shape, stored.shape[1] // scale.shape[1])  # also of no rows
        return np.multiply(blocks, scale[:, :, None], dtype=np.float32).reshape(stored.shape)
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored
