"""Keeping: what a step adds to the contrastive loss, so that a student does not forget what it inherited.

Letters: B images of this process, m captions of each, D shared width, E <= D of the model that the tower comes from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llm2clip.student.gradcache import MicroBatch
from llm2clip.student.inheritance.inherit import distance
from llm2clip.student.model import Student


class Objective:
    """The loss of a batch: contrastive, and the distance from what is to be kept.

    Args:
        contrastive: gets image [B, D], text [B * m, D], scale and perhaps bias.
        micro_batches: images and teacher vectors of their captions.
        images: [B, E] of unit length, what the tower saw in these images before; None to let it forget.
        texts: teacher vectors [B, T] of inherited captions and what the tower's text half says of them [B, E]; None to
            let the adaptor forget.
        keep, keep_text: weights of the two distances.

    Attributes:
        micro_batches: those to run, each with its share of the inherited captions after its own.
    """

    def __init__(
        self,
        contrastive: Callable[..., Tensor],
        micro_batches: Sequence[MicroBatch],
        *,
        images: Tensor | None = None,
        texts: tuple[Tensor, Tensor] | None = None,
        keep: float = 0.0,
        keep_text: float = 0.0,
    ) -> None:
        self._contrastive, self._images, self._keep, self._keep_text = contrastive, images, keep, keep_text
        self._own = None if texts is None else texts[1]
        self.micro_batches = list(micro_batches)
        self._counts: list[int] = []
        if texts is None:
            return
        shares = texts[0].split([len(pixels) for pixels, _ in micro_batches])
        for place, ((pixels, own), share) in enumerate(zip(micro_batches, shares, strict=True)):
            self._counts += [len(own), len(share)]
            self.micro_batches[place] = (pixels, torch.cat([own, share.to(own.dtype)]))

    def captions(self, text: Tensor) -> Tensor:
        """Of the vectors [B * m + B, D] of a step those of the images' captions, [B * m, D]."""
        return torch.cat(text.split(self._counts)[::2]) if self._counts else text

    def __call__(self, image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
        """The loss []."""
        loss = self._contrastive(image, self.captions(text), *scalars)
        if self._images is not None:
            loss = loss + self._keep * distance(image, self._images)
        if self._own is not None:
            loss = loss + self._keep_text * distance(torch.cat(text.split(self._counts)[1::2]), self._own)
        return loss


class OwnView:
    """What the tower saw in images before it learned: unit vectors [b, E] of a frozen copy.

    Args:
        student: fresh, its first E dimensions are those of the model that its tower comes from.
        width: E.
        num_samples: images whose vectors are remembered, as they are always the same; 0 for none.
    """

    def __init__(self, student: Student, width: int, *, num_samples: int = 0) -> None:
        shared = {id(student.adaptor): student.adaptor}  # of no use here, and large
        self._frozen: Any = copy.deepcopy(student, shared)
        self._frozen.tower.eval()
        self._width = width
        self._known = torch.zeros(num_samples, dtype=torch.bool)
        self._vectors = torch.empty(num_samples, width, dtype=torch.float16)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, samples: Tensor) -> Tensor:
        """Of images [b, 3, H, W], which are these samples."""
        numbers = samples.cpu()
        if len(self._known) and bool(self._known[numbers].all()):
            return self._vectors[numbers].to(pixels.device).float()
        self._frozen.to(pixels.device)
        vectors = normalize(self._frozen.get_image_features(pixels)[:, : self._width].float(), dim=-1)
        if len(self._known):
            self._known[numbers], self._vectors[numbers] = True, vectors.half().cpu()
        return vectors
