"""Captions of all processes: gathered, summed back, with another number of them on each process.

Letters: W processes, n captions on this process, M captions on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The names since torch 2.14, where the older ones warn in every process.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes that share a batch, and what each brings.

    Example:
        >>> world = World.of(torch.zeros(3, 8), torch.zeros(6, 8))  # one process
        >>> world.size, world.num_pictures, world.num_captions, world.first_picture
        (1, 3, 6, 0)
    """

    pictures: tuple[int, ...]
    """Pictures on each process, in the order of rank."""
    captions: tuple[int, ...]
    """Captions on each process, in the order of rank."""
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, image: Tensor, text: Tensor, group: dist.ProcessGroup | None = None) -> World:
        """The world of `image` [b, ...] and `text` [n, ...]; all processes of `group` (None: the default) call it."""
        own = (len(image), len(text))
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return cls(pictures=own[:1], captions=own[1:])
        counts = torch.empty(dist.get_world_size(group), 2, dtype=torch.int64, device=image.device)
        _all_gather(counts, counts.new_tensor([own]), group=group)
        pictures, captions = counts.T.tolist()
        return cls(pictures=tuple(pictures), captions=tuple(captions), rank=dist.get_rank(group), group=group)

    @property
    def size(self) -> int:
        """W."""
        return len(self.pictures)

    @property
    def num_pictures(self) -> int:
        """Pictures on all processes."""
        return sum(self.pictures)

    @property
    def num_captions(self) -> int:
        """M."""
        return sum(self.captions)

    @property
    def first_picture(self) -> int:
        """How many pictures the processes before this one bring."""
        return sum(self.pictures[: self.rank])

    def gather(self, captions: Tensor) -> Tensor:
        """What every process has of its captions [n, ...], in the order of rank: [M, ...]. It carries no gradient."""
        if self.size == 1:
            return captions
        most = max(self.captions)
        padded = captions.new_zeros(most, *captions.shape[1:])
        padded[: len(captions)] = captions
        everyone = captions.new_empty(self.size * most, *captions.shape[1:])
        _all_gather(everyone, padded, group=self.group)
        if len(everyone) == self.num_captions:
            return everyone
        parts = zip(everyone.split(most), self.captions, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def sum_back(self, captions: Tensor) -> Tensor:
        """`gather` reversed: each process gets the sum over processes of what they have for its captions, [n, ...]."""
        if self.size == 1:
            return captions
        most = max(self.captions)
        if len(captions) != self.size * most:
            padded = captions.new_zeros(self.size * most, *captions.shape[1:])
            for slot, part in zip(padded.split(most), captions.split(self.captions), strict=True):
                slot[: len(part)] = part
            captions = padded
        own = captions.new_empty(most, *captions.shape[1:])
        _reduce_scatter(own, captions, group=self.group)
        return own[: self.captions[self.rank]]

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all processes' `values`, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values
