"""The contrastive losses between images and captions: exact, in tiles, over all processes.

The formulas are in `loss_tiles.py`, the bounds of the temperature in `model.py`.

`contrastive_loss` gives the loss of the whole batch, on every process. Its backward follows the convention of data
parallel training, where gradients of weights are averaged over the W processes (DDP, FSDP2): each process gets W times
the derivative of that loss by its own rows, so the average is exactly the gradient that one process with the whole
batch would have.

Captions are gathered, not passed around in a ring (`benchmarks/ring.py`): each process holds all [M, D] captions and
their gradient. A step moves captions once and their gradient once, where a ring moves captions twice and open_clip's
ClipLoss moves images as well.

Letters: b images on this process, B on all; m captions an image, M = m * B; D shared width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm2clip.errors import UsageError
from llm2clip.student.gather import gather, num_processes, rank, sum_back
from llm2clip.student.loss_tiles import Gradients, SoftmaxTarget, Stripe, Targets, sigmoid_loss, softmax_loss

TILE, CPU_TILE = 2048, 1024
"""Scores of 16 and 4 MiB in fp32: large enough for matrix products at full speed, small beside the vectors."""


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
    rows: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """The loss [] of a batch of images and their captions, spread evenly over all processes.

    "softmax" is CLIP's (arXiv 2103.00020, figure 3): the mean of two cross-entropies, each image among all captions
    and each caption among all images. With several captions an image, the image's target is shared evenly among
    them. "sigmoid" is SigLIP's (arXiv 2303.15343, equation 1), divided by the number of captions.

    Args:
        image: unit vectors of images [b, D], equally many on all processes.
        text: unit vectors of captions [b * m, D], the m captions of an image one after another. fp16 and bf16 vectors
            are computed with in fp32.
        scale: what multiplies the cosines, one number: the inverse temperature.
        bias: what is added to the scores, one number, "sigmoid" only and needed there; SigLIP starts from -10.
        kind: "softmax" or "sigmoid".
        label_smoothing: share of each target spread evenly over all captions (or images), "softmax" only.
        rows: bank rows of the captions, int64 [b * m]. With them, equal captions of different images are left out:
            neither right nor wrong.
        tile: images, and captions, of which scores exist at a time; changes memory, not the result. None takes 1024
            on a CPU, 2048 on other devices.

    Raises:
        UsageError: for shapes or options that do not go together, or other numbers of them on other processes.

    Example:
        >>> image, text = torch.eye(3, 8, requires_grad=True), torch.eye(3, 8)
        >>> loss = contrastive_loss(image, text, torch.tensor(10.0))
        >>> round(loss.item(), 6)  # log(exp(10) + 2) - 10
        9.1e-05
        >>> loss.backward()
    """
    _check_kind(kind, bias=bias, label_smoothing=label_smoothing)
    _check_shapes(image, text, rows=rows)
    targets = Targets(
        captions_each=_captions_each(image, text),
        first=rank() * len(image),
        device=image.device,
        own_rows=rows,
        all_rows=None if rows is None else gather(rows),
    )
    tile = tile or (CPU_TILE if image.device.type == "cpu" else TILE)
    return _TiledLoss.apply(image, text, scale, bias, kind, label_smoothing, targets, tile)


KINDS: dict[str, Callable[[Stripe, Any, float, bool], tuple[Tensor, Gradients | None]]] = {
    "softmax": lambda stripe, _, smoothing, wanted: softmax_loss(
        stripe, SoftmaxTarget(smoothing), with_gradients=wanted
    ),
    "sigmoid": lambda stripe, bias, _, wanted: sigmoid_loss(
        stripe, bias.to(stripe.scale.dtype).view(()), with_gradients=wanted
    ),
}
"""A loss from the scores, the bias if it has one, the label smoothing, and whether derivatives are wanted."""


class _TiledLoss(torch.autograd.Function):
    """Computes the derivatives with the loss, while scores are at hand; backward only multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        kind: str,
        label_smoothing: float,
        targets: Targets,
        tile: int,
    ) -> Tensor:
        dtype = torch.promote_types(image.dtype, torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            stripe = Stripe(
                image=image.to(dtype),
                text=gather(text).to(dtype),
                scale=scale.to(dtype).view(()),
                targets=targets,
                tile=tile,
            )
            loss, gradients = KINDS[kind](stripe, bias, label_smoothing, any(ctx.needs_input_grad))
        if gradients is not None:
            own = gradients._replace(text=sum_back(gradients.text))
            ctx.save_for_backward(*own)
            ctx.num_processes = num_processes()
            ctx.like = [(t.dtype, t.shape) if t is not None else None for t in (image, text, scale, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = Gradients(*ctx.saved_tensors)
        given = zip(saved, ctx.like, ctx.needs_input_grad, strict=False)
        results = [
            (gradient * (by_loss * ctx.num_processes)).to(like[0]).view(like[1]) if needed and like else None
            for gradient, like, needed in given
        ]
        return (*results, None, None, None, None)


def _check_kind(kind: str, *, bias: Tensor | None, label_smoothing: float) -> None:
    if kind not in KINDS:
        raise UsageError(f"loss kind is {kind!r}; choose from {', '.join(KINDS)}")
    if kind == "sigmoid" and bias is None:
        raise UsageError("the sigmoid loss needs a bias; pass bias=student.logit_bias (SigLIP starts it at -10)")
    if kind == "softmax" and bias is not None:
        raise UsageError("the softmax loss does not depend on a bias; leave bias out, or choose kind='sigmoid'")
    if kind == "sigmoid" and label_smoothing:
        raise UsageError("label_smoothing is for kind='softmax'; leave it at 0")
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"label_smoothing is {label_smoothing}; it is a share between 0 and 1")


def _check_shapes(image: Tensor, text: Tensor, *, rows: Tensor | None) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise UsageError(f"image {tuple(image.shape)} and text {tuple(text.shape)} must be [b, D] and [b * m, D]")
    if rows is not None and len(rows) != len(text):
        raise UsageError(f"rows has {len(rows)} entries for {len(text)} captions; give one a caption")


def _captions_each(image: Tensor, text: Tensor) -> int:
    """The m of this batch. All processes see the numbers of all, so that all of them stop where one is wrong."""
    num_images, num_captions = len(image), len(text)
    counts = [[num_images, num_captions]]
    if num_processes() > 1:
        counts = gather(torch.tensor(counts, device=image.device)).tolist()
    same = all(each == counts[0] for each in counts)
    if not same or not num_images or not num_captions or num_captions % num_images:
        images, captions = map(list, zip(*counts, strict=True))
        raise UsageError(
            f"{captions} captions for {images} images (by process); every process needs the same number of "
            "images, and every image the same number of captions, at least one"
        )
    return num_captions // num_images
