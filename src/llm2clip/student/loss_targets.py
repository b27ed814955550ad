"""Which captions of a batch belong to which picture, which are left out, and how alike the teacher finds them.

Everything is made for one tile of the score matrix at a time, so that no matrix of the whole batch exists.

Letters: b pictures on this process, m captions a picture, M captions on all processes, T teacher width, R x C a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileTargets:
    """What is known of the pairs in one tile; None stands for a matrix of zeros."""

    positive: Tensor | None
    """bool [R, C]: the caption describes the picture."""
    ignored: Tensor | None
    """bool [R, C]: neither right nor wrong; never positive."""
    alike: Tensor | None
    """float [R, C]: exp((cosine - 1) / temperature) of teacher vectors, 0 where ignored."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The relations between the pictures of this process and the captions of all processes.

    Picture i of this process owns the m captions from `(first + i) * m` on. What the teacher thinks of a picture is
    the mean of its captions' unit vectors.
    """

    captions_each: int
    """m."""
    first: int
    """How many pictures the processes before this one hold."""
    device: torch.device
    """Where tiles are made."""
    own_rows: Tensor | None = None
    """Bank rows of this process's captions, int64 [b * m]; equal captions have equal rows."""
    all_rows: Tensor | None = None
    """Bank rows of all captions, int64 [M]."""
    identical: str = "ignore"
    """What a caption is to a picture that has the same caption elsewhere: "ignore" or "positive"."""
    own_teacher: Tensor | None = None
    """Teacher vectors of this process's captions [b * m, T]."""
    all_teacher: Tensor | None = None
    """Teacher vectors of all captions [M, T]."""
    ignore_above: float | None = None
    """Captions of other pictures whose teacher cosine is above this are ignored."""
    temperature: float | None = None
    """Divides the teacher's cosines in `TileTargets.alike`; None makes none."""

    def tile(self, pictures: slice, captions: slice) -> TileTargets:
        """The relations of `pictures` (places on this process) and `captions` (places among all)."""
        positive, ignored = self._own(pictures, captions), None
        cosine = self._cosine(pictures, captions)
        same = self._same_row(pictures, captions)
        if self.identical == "positive" and same is not None:
            positive = same  # a picture's own captions have its rows too
        else:
            ignored = same
        if cosine is not None and self.ignore_above is not None:
            near = cosine > self.ignore_above
            ignored = near if ignored is None else ignored | near
        if ignored is not None and positive is not None:
            ignored = ignored & ~positive
        return TileTargets(positive, ignored, self._alike(cosine, ignored))

    def _own(self, pictures: slice, captions: slice) -> Tensor | None:
        start, stop = self.first + pictures.start, self.first + pictures.stop
        if captions.stop <= start * self.captions_each or captions.start >= stop * self.captions_each:
            return None
        owner = torch.arange(captions.start, captions.stop, device=self.device) // self.captions_each
        return torch.arange(start, stop, device=self.device)[:, None] == owner

    def _same_row(self, pictures: slice, captions: slice) -> Tensor | None:
        if self.own_rows is None or self.all_rows is None:
            return None
        own = self.own_rows.view(-1, self.captions_each)[pictures]
        every = self.all_rows[captions]
        same = own[:, :1] == every
        for i in range(1, self.captions_each):
            same |= own[:, i : i + 1] == every
        return same

    def _cosine(self, pictures: slice, captions: slice) -> Tensor | None:
        if self.own_teacher is None or self.all_teacher is None:
            return None
        m = self.captions_each
        own = _unit(self.own_teacher[pictures.start * m : pictures.stop * m])
        if m > 1:
            own = _unit(own.view(-1, m, own.shape[-1]).mean(dim=1))
        return own @ _unit(self.all_teacher[captions]).T

    def _alike(self, cosine: Tensor | None, ignored: Tensor | None) -> Tensor | None:
        if cosine is None or self.temperature is None:
            return None
        alike = cosine.sub_(1).div_(self.temperature).exp_()
        return alike if ignored is None else alike.masked_fill_(ignored, 0)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
