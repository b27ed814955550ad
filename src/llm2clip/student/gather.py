"""Captions of all processes: gathered, summed back. Every process brings equally many.

sentence-transformers' `all_gather_with_grad` does both in one. The loss needs them apart: it makes the gradient of all
captions itself, in fp32 also where vectors are gathered in half precision.

Letters: W processes, n captions on this process, M = W * n captions on all of them.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

# The names since torch 2.14, where the older ones warn in every process.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def num_processes() -> int:
    """W."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def gather(own: Tensor) -> Tensor:
    """What every process has of its captions [n, ...], in the order of rank: [M, ...]. It carries no gradient."""
    if num_processes() == 1:
        return own
    everyone = own.new_empty(num_processes() * len(own), *own.shape[1:])
    _all_gather(everyone, own.contiguous())
    return everyone


def sum_back(everyone: Tensor) -> Tensor:
    """`gather` reversed: each process gets the sum over processes of what they have for its captions, [n, ...]."""
    if num_processes() == 1:
        return everyone
    own = everyone.new_empty(len(everyone) // num_processes(), *everyone.shape[1:])
    _reduce_scatter(own, everyone)
    return own


def sum_over_processes(values: Tensor) -> Tensor:
    """`values` summed over processes, in place."""
    if num_processes() > 1:
        dist.all_reduce(values)
    return values


def largest_over_processes(values: Tensor) -> Tensor:
    """The largest of all processes' `values`, element by element, in place."""
    if num_processes() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values
