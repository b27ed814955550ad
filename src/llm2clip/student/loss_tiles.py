"""Contrastive losses and their gradients, tile by tile: O(B x D + tile) memory, never a B x B matrix.

Letters: b images on this process, N on all; m captions an image, M on all processes; D shared width; R x C a tile.
This process computes the stripe of scores s = scale * image @ text.T between its b images and all M captions. Sums
over images, which the other processes share, are small ([M] numbers) and are summed over processes in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from llm2clip.student.gather import largest_over_processes, num_processes, sum_over_processes


class TileTargets(NamedTuple):
    """What is known of the pairs in one tile; None stands for a matrix of zeros."""

    positive: Tensor | None
    """bool [R, C]: the caption describes the image."""
    ignored: Tensor | None
    """bool [R, C]: neither right nor wrong; never positive."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The relations between the images of this process and the captions of all processes, made a tile at a time.

    Image i of this process owns the m captions from `(first + i) * m` on. Captions equal to one of them are ignored.
    """

    captions_each: int
    """m."""
    first: int
    """How many images the processes before this one hold."""
    device: torch.device
    """Where tiles are made."""
    own_rows: Tensor | None = None
    """Bank rows of this process's captions, int64 [b * m]; equal captions have equal rows."""
    all_rows: Tensor | None = None
    """Bank rows of all captions, int64 [M]."""

    def tile(self, images: slice, captions: slice) -> TileTargets:
        """The relations of `images` (places on this process) and `captions` (places among all)."""
        positive, ignored = self._own(images, captions), self._same_row(images, captions)
        if ignored is not None and positive is not None:
            ignored = ignored & ~positive  # an image's own captions have its rows too
        return TileTargets(positive, ignored)

    def _own(self, images: slice, captions: slice) -> Tensor | None:
        start, stop = self.first + images.start, self.first + images.stop
        if captions.stop <= start * self.captions_each or captions.start >= stop * self.captions_each:
            return None
        owner = torch.arange(captions.start, captions.stop, device=self.device) // self.captions_each
        return torch.arange(start, stop, device=self.device)[:, None] == owner

    def _same_row(self, images: slice, captions: slice) -> Tensor | None:
        if self.own_rows is None or self.all_rows is None:
            return None
        own = self.own_rows.view(-1, self.captions_each)[images]
        every = self.all_rows[captions]
        same = own[:, :1] == every
        for i in range(1, self.captions_each):
            same |= own[:, i : i + 1] == every
        return same


class Gradients(NamedTuple):
    """Derivatives of the loss: by the images [b, D], by all captions [M, D] (this process's part), scale, bias."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(kw_only=True)
class Stripe:
    """The scores of this process's images with all captions, never all at once."""

    image: Tensor
    """[b, D]."""
    text: Tensor
    """[M, D], the captions of all processes."""
    scale: Tensor
    """[]."""
    targets: Targets
    tile: int
    """Images, and captions, in a tile."""
    _last: tuple[slice, slice, Tensor] | None = field(default=None, init=False)

    @property
    def num_images(self) -> int:
        """N; all processes hold equally many."""
        return len(self.image) * num_processes()

    def tiles(self) -> list[tuple[slice, slice]]:
        """All (images, captions) of the stripe."""
        return [(rows, columns) for rows in self._cut(len(self.image)) for columns in self._cut(len(self.text))]

    def scores(self, rows: slice, columns: slice) -> Tensor:
        """`scale * image @ text.T` of one tile; the last one is remembered, for the pass that goes backwards."""
        if self._last is None or self._last[:2] != (rows, columns):
            self._last = None  # freed before the next one is made
            self._last = (rows, columns, (self.image[rows] * self.scale) @ self.text[columns].T)
        return self._last[2]

    def empty_gradients(self) -> Gradients:
        """Zeros, to be filled by `add_gradient`."""
        zero = self.scale.new_zeros(())
        return Gradients(torch.zeros_like(self.image), torch.zeros_like(self.text), zero, zero.clone())

    def add_gradient(self, sums: Gradients, rows: slice, columns: slice, by_score: Tensor) -> None:
        """Add what the derivative of the loss by a tile's scores [R, C] brings, but for the factor `scale`."""
        sums.image[rows].addmm_(by_score, self.text[columns])
        sums.text[columns].addmm_(by_score.T, self.image[rows])

    def finish(self, sums: Gradients) -> Gradients:
        """Make the derivative by `scale` of the sums of `add_gradient`, and give these their factor `scale`.

        As s = scale * x @ y, it is the sum over pairs of dL/ds * (x @ y): over images, of x @ (the sum for x).
        """
        sums.scale.add_((self.image * sums.image).sum())
        sums.image.mul_(self.scale)
        sums.text.mul_(self.scale)
        return sums

    def _cut(self, length: int) -> list[slice]:
        return [slice(start, min(start + self.tile, length)) for start in range(0, length, self.tile)]


@dataclass(frozen=True)
class SoftmaxTarget:
    """What each image's distribution over captions (and each caption's over images) should be: a sum of two parts.

    `(1 - smoothing) * positives + smoothing * uniform`, each part summing to 1.
    """

    smoothing: float

    @property
    def shares(self) -> tuple[float, float]:
        """Of the positives and the uniform part."""
        return 1 - self.smoothing, self.smoothing

    def weights(self, known: TileTargets, scores: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The parts of a tile that are not all zero: (number of the part, weights [R, C] before they sum to 1)."""
        if known.positive is not None:
            yield 0, known.positive.to(scores)
        if self.smoothing:
            yield 1, torch.ones_like(scores) if known.ignored is None else (~known.ignored).to(scores)


class Sums(NamedTuple):
    """What the first pass knows of every image of this process, or of every caption of all: L of them.

    The largest score is kept apart from the rest of its log-sum-exp: where a loss is near 0, their sum would round away
    all that matters.
    """

    largest: Tensor
    """The largest score, [L]."""
    total: Tensor
    """The sum of exp(score - largest), [L]."""
    parts: Tensor
    """For each part of a target: sum of weights times scores, and sum of weights, [2, 2, L]."""

    @classmethod
    def none(cls, vectors: Tensor) -> Sums:
        """Those of `vectors` [L, D] over no scores."""
        length = len(vectors)
        # The lowest number instead of -inf, as -inf - -inf is not a number.
        lowest = vectors.new_full((length,), torch.finfo(vectors.dtype).min)
        return cls(lowest, vectors.new_zeros(length), vectors.new_zeros(2, 2, length))

    def add(self, where: slice, scores: Tensor, *, dim: int) -> None:
        """Take in the exponentials of a tile's scores along `dim`."""
        largest = torch.maximum(self.largest[where], scores.amax(dim=dim))
        self.total[where] *= (self.largest[where] - largest).exp_()
        self.total[where] += (scores - largest.unsqueeze(dim)).exp_().sum(dim=dim)
        self.largest[where] = largest

    def over_processes(self) -> Sums:
        """These sums with those of the other processes."""
        largest = largest_over_processes(self.largest.clone())
        both = torch.cat([(self.total * (self.largest - largest).exp_())[None], self.parts.flatten(0, 1)])
        total, *parts = sum_over_processes(both)
        return Sums(largest, total, torch.stack(parts).view_as(self.parts))

    def losses(self, target: SoftmaxTarget) -> Tensor:
        """The cross-entropy of each with its target distribution, [L]."""
        shares = enumerate(target.shares)
        wanted = torch.stack([share * self.parts[i, 0] / self.parts[i, 1] for i, share in shares if share])
        return self.largest - wanted.sum(dim=0) + self.total.log()


def softmax_loss(stripe: Stripe, target: SoftmaxTarget, *, with_gradients: bool) -> tuple[Tensor, Gradients | None]:
    """The mean of the cross-entropies image to caption (over N) and caption to image (over M).

    Two passes: the first sums exponentials and target terms along rows and columns of the same tile; the second makes
    the scores anew, and from them the derivatives.

    Returns:
        The loss of the whole batch, equal on all processes, and this process's part of its derivatives.
    """
    images, captions = _softmax_sums(stripe, target)
    by_image = sum_over_processes(images.losses(target).sum()) / stripe.num_images
    loss = (by_image + captions.losses(target).sum() / len(stripe.text)) / 2
    return loss, _softmax_gradients(stripe, target, images, captions) if with_gradients else None


def _softmax_sums(stripe: Stripe, target: SoftmaxTarget) -> tuple[Sums, Sums]:
    """The sums of this process's images over all captions, and of all captions over all processes' images."""
    images, captions = Sums.none(stripe.image), Sums.none(stripe.text)
    for rows, columns in stripe.tiles():
        scores = stripe.scores(rows, columns)
        known = stripe.targets.tile(rows, columns)
        allowed = scores if known.ignored is None else scores.masked_fill(known.ignored, -math.inf)
        images.add(rows, allowed, dim=1)
        captions.add(columns, allowed, dim=0)
        for part, weights in target.weights(known, scores):
            weighted = weights * scores
            images.parts[part, :, rows] += torch.stack([weighted.sum(dim=1), weights.sum(dim=1)])
            captions.parts[part, :, columns] += torch.stack([weighted.sum(dim=0), weights.sum(dim=0)])
    return images, captions.over_processes()


def _softmax_gradients(stripe: Stripe, target: SoftmaxTarget, images: Sums, captions: Sums) -> Gradients:
    """The second pass."""
    by_image, by_caption = 1 / (2 * stripe.num_images), 1 / (2 * len(stripe.text))
    gradients = stripe.empty_gradients()
    for rows, columns in reversed(stripe.tiles()):
        scores = stripe.scores(rows, columns)
        known = stripe.targets.tile(rows, columns)
        by_score = (scores - images.largest[rows, None]).exp_().mul_(by_image / images.total[rows, None])
        by_score += (scores - captions.largest[columns]).exp_().mul_(by_caption / captions.total[columns])
        if known.ignored is not None:
            by_score.masked_fill_(known.ignored, 0)
        for part, weights in target.weights(known, scores):
            factor = by_image / images.parts[part, 1, rows, None] + by_caption / captions.parts[part, 1, columns]
            by_score -= weights * factor.mul_(target.shares[part])
        stripe.add_gradient(gradients, rows, columns, by_score)
    return stripe.finish(gradients)


def sigmoid_loss(stripe: Stripe, bias: Tensor, *, with_gradients: bool) -> tuple[Tensor, Gradients | None]:
    """The sum over all pairs of -log sigmoid(+-(s + bias)), plus for positives, divided by M. One pass.

    Returns:
        The loss of the whole batch, equal on all processes, and this process's part of its derivatives.
    """
    num_captions = len(stripe.text)
    gradients = stripe.empty_gradients() if with_gradients else None
    loss = stripe.scale.new_zeros(())
    for rows, columns in stripe.tiles():
        wrongness = stripe.scores(rows, columns) + bias
        known = stripe.targets.tile(rows, columns)
        sign = None if known.positive is None else 1 - 2 * known.positive.to(wrongness)
        if sign is not None:
            wrongness *= sign
        if known.ignored is not None:
            wrongness.masked_fill_(known.ignored, -math.inf)
        loss += functional.softplus(wrongness).sum()
        if gradients is not None:
            by_score = wrongness.sigmoid_().div_(num_captions)
            if sign is not None:
                by_score *= sign
            gradients.bias.add_(by_score.sum())
            stripe.add_gradient(gradients, rows, columns, by_score)
    loss = sum_over_processes(loss) / num_captions
    return loss, None if gradients is None else stripe.finish(gradients)
