"""Stored vectors come back as close as their dtype allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2clip.bank.dtypes import DTYPES, STORED, pack, read_dtype, row_bytes, unpack
from llm2clip.bank.verify import cosines


def round_trip(vectors: torch.Tensor, dtype: str) -> np.ndarray:
    stored, scale = pack(vectors, dtype)
    array = stored.numpy().view(STORED[dtype])
    assert array.nbytes + (0 if scale is None else 4 * scale.numel()) == len(vectors) * row_bytes(
        dtype, vectors.shape[1]
    )
    return unpack(array, None if scale is None else scale.numpy(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype: str) -> None:
    vectors = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 7
    back = round_trip(vectors, dtype)
    assert back.dtype == read_dtype(dtype)
    tolerance = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}.get(dtype)
    if tolerance is None:
        step = (vectors.unflatten(1, (5, 60)).abs().amax(2, keepdim=True) / 127).expand(-1, -1, 60).flatten(1).numpy()
        assert (np.abs(back - vectors.numpy()) <= step * 0.501).all()
    else:
        np.testing.assert_allclose(back, vectors.numpy(), rtol=tolerance, atol=1e-6 if tolerance else 0)


def test_int8_by_hand() -> None:
    stored, scale = pack(torch.tensor([[1.27, -0.64, 0.0], [0.0, 0.0, 0.0]]), "int8")
    assert stored.tolist() == [[127, -64, 0], [0, 0, 0]]
    np.testing.assert_allclose(scale, [[0.01], [0.0]], rtol=1e-6)


def test_int8_keeps_the_direction() -> None:
    vectors = torch.randn(200, 1024, generator=torch.Generator().manual_seed(1))
    vectors[:, 3] *= 30  # as LLMs do: one dimension far larger than the others
    assert cosines(round_trip(vectors, "int8"), vectors.numpy()).min() > 0.9995


def test_bfloat16_is_its_bits() -> None:
    stored, _ = pack(torch.tensor([[1.0, -2.0]]), "bfloat16")
    assert stored.numpy().view(np.uint16).tolist() == [[0x3F80, 0xC000]]


def test_packing_half_precision_vectors() -> None:
    vectors = torch.tensor([[0.5, -1.0]], dtype=torch.bfloat16)
    for dtype in DTYPES:
        np.testing.assert_allclose(round_trip(vectors, dtype), [[0.5, -1.0]], rtol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: str) -> None:
    assert round_trip(torch.zeros(0, 48), dtype).shape == (0, 48)
