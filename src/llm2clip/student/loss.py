"""The contrastive losses between pictures and captions: exact, in tiles, over all processes.

`contrastive_loss` gives the loss of the whole batch, on every process. Its backward follows the convention of data
parallel training, where gradients of weights are averaged over the W processes (DDP, FSDP2): each process gets W times
the derivative of that loss by its own rows, so the average is exactly the gradient that one process with the whole
batch would have.

Captions are gathered, not passed around in a ring (`benchmarks/ring.py`): each process holds all [M, D] captions and
their gradient. A step moves captions once and their gradient once, where a ring moves captions twice and open_clip's
ClipLoss moves pictures as well.

Letters: b pictures on this process, B on all; m captions a picture, M = m * B; D shared width; T teacher width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm2clip.errors import UsageError
from llm2clip.student.gather import World
from llm2clip.student.loss_targets import Targets
from llm2clip.student.loss_tiles import Gradients, SoftmaxTarget, Stripe, sigmoid_loss, softmax_loss

KINDS = ("softmax", "sigmoid")
TILE, CPU_TILE = 2048, 1024
"""Scores of 16 and 4 MiB in fp32: large enough for matrix products at full speed, small beside the vectors."""


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
    rows: Tensor | None = None,
    identical: str = "ignore",
    teacher: Tensor | None = None,
    ignore_above: float | None = None,
    soft_targets: float = 0.0,
    soft_temperature: float = 0.05,
    tile: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The loss [] of a batch of pictures and their captions, spread over the processes of `group`.

    "softmax" is CLIP's (arXiv 2103.00020, figure 3): the mean of two cross-entropies, each picture among all captions
    and each caption among all pictures. With several captions a picture, the picture's target is shared evenly among
    them. "sigmoid" is SigLIP's (arXiv 2303.15343, equation 1), divided by the number of captions.

    Args:
        image: unit vectors of pictures [b, D]; processes may hold different numbers of them, also none.
        text: unit vectors of captions [b * m, D], the m captions of a picture one after another. The m is the same on
            all processes. fp16 and bf16 vectors are computed with in fp32.
        scale: what multiplies the cosines, one number: the inverse temperature.
        bias: what is added to the scores, one number, "sigmoid" only and needed there; SigLIP starts from -10.
        kind: "softmax" or "sigmoid".
        label_smoothing: share of each target spread evenly over all captions (or pictures), "softmax" only.
        rows: bank rows of the captions, int64 [b * m]. With them, equal captions of different pictures are not
            taken for wrong ones.
        identical: what an equal caption is: "ignore" leaves it out, "positive" takes it as right.
        teacher: the teacher's vectors of the captions [b * m, T], of any length; for the next two options. They cost
            T / D times what the loss costs.
        ignore_above: leave out captions of other pictures whose teacher cosine is above this.
        soft_targets: share of each target that follows the teacher: softmax over captions of their teacher cosine
            with the picture's own captions, "softmax" only.
        soft_temperature: divides those cosines.
        tile: pictures, and captions, of which scores exist at a time; changes memory, not the result. None takes 1024
            on a CPU, 2048 on other devices.
        group: processes that share the batch; None is the default group, or one process if there is none.

    Raises:
        UsageError: for shapes or options that do not go together.

    Example:
        >>> image, text = torch.eye(3, 8, requires_grad=True), torch.eye(3, 8)
        >>> loss = contrastive_loss(image, text, torch.tensor(10.0))
        >>> round(loss.item(), 6)  # log(exp(10) + 2) - 10
        9.1e-05
        >>> loss.backward()
    """
    _check_kind(kind, bias=bias, label_smoothing=label_smoothing, soft_targets=soft_targets)
    _check_options(
        identical=identical,
        teacher=teacher,
        ignore_above=ignore_above,
        soft_targets=soft_targets,
        soft_temperature=soft_temperature,
    )
    _check_shapes(image, text, rows=rows, teacher=teacher)
    world = World.of(image, text, group)
    targets = Targets(
        captions_each=_captions_each(world),
        first=world.first_picture,
        device=image.device,
        own_rows=rows,
        all_rows=None if rows is None else world.gather(rows),
        identical=identical,
        own_teacher=teacher,
        all_teacher=None if teacher is None else world.gather(teacher),
        ignore_above=ignore_above,
        temperature=soft_temperature if soft_targets else None,
    )
    target = SoftmaxTarget(smoothing=label_smoothing, soft=soft_targets) if kind == "softmax" else None
    tile = tile or (CPU_TILE if image.device.type == "cpu" else TILE)
    return _TiledLoss.apply(image, text, scale, bias, target, targets, world, tile)


class _TiledLoss(torch.autograd.Function):
    """Computes the derivatives with the loss, while scores are at hand; backward only multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        target: SoftmaxTarget | None,
        targets: Targets,
        world: World,
        tile: int,
    ) -> Tensor:
        dtype = torch.promote_types(image.dtype, torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            stripe = Stripe(
                image=image.to(dtype),
                text=world.gather(text).to(dtype),
                scale=scale.to(dtype).view(()),
                targets=targets,
                world=world,
                tile=tile,
            )
            with_gradients = any(ctx.needs_input_grad)
            if target is not None:
                loss, gradients = softmax_loss(stripe, target, with_gradients=with_gradients)
            else:
                assert bias is not None, "checked by contrastive_loss"
                loss, gradients = sigmoid_loss(stripe, bias.to(dtype).view(()), with_gradients=with_gradients)
        if gradients is not None:
            own = gradients._replace(text=world.sum_back(gradients.text))
            ctx.save_for_backward(*own)
            ctx.num_processes = world.size
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


def _check_kind(kind: str, *, bias: Tensor | None, label_smoothing: float, soft_targets: float) -> None:
    if kind not in KINDS:
        raise UsageError(f"loss kind is {kind!r}; choose from {', '.join(KINDS)}")
    if kind == "sigmoid" and bias is None:
        raise UsageError("the sigmoid loss needs a bias; pass bias=student.logit_bias (SigLIP starts it at -10)")
    if kind == "softmax" and bias is not None:
        raise UsageError("the softmax loss does not depend on a bias; leave bias out, or choose kind='sigmoid'")
    if kind == "sigmoid" and (label_smoothing or soft_targets):
        raise UsageError("label_smoothing and soft_targets are for kind='softmax'; leave them at 0")
    for name, share in (("label_smoothing", label_smoothing), ("soft_targets", soft_targets)):
        if not 0 <= share <= 1:
            raise UsageError(f"{name} is {share}; it is a share between 0 and 1")


def _check_options(
    *, identical: str, teacher: Tensor | None, ignore_above: float | None, soft_targets: float, soft_temperature: float
) -> None:
    if identical not in ("ignore", "positive"):
        raise UsageError(f"identical is {identical!r}; choose from ignore, positive")
    if teacher is None and (ignore_above is not None or soft_targets):
        raise UsageError("ignore_above and soft_targets need the teacher's vectors; pass teacher=")
    if soft_temperature <= 0:
        raise UsageError(f"soft_temperature is {soft_temperature}; it must be above 0")


def _check_shapes(image: Tensor, text: Tensor, *, rows: Tensor | None, teacher: Tensor | None) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise UsageError(f"image {tuple(image.shape)} and text {tuple(text.shape)} must be [b, D] and [b * m, D]")
    for name, value in (("rows", rows), ("teacher", teacher)):
        if value is not None and len(value) != len(text):
            raise UsageError(f"{name} has {len(value)} entries for {len(text)} captions; give one a caption")


def _captions_each(world: World) -> int:
    """m, found from what all processes hold, so that all of them stop where one is wrong."""
    num_pictures, num_captions = max(zip(world.pictures, world.captions, strict=True))
    captions_each = num_captions // max(num_pictures, 1)
    if not captions_each or any(captions_each * b != n for b, n in zip(world.pictures, world.captions, strict=True)):
        raise UsageError(
            f"{list(world.captions)} captions for {list(world.pictures)} pictures (by process); every picture of the "
            "batch needs the same number of captions, at least one"
        )
    return captions_each
