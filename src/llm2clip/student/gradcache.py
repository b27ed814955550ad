"""Gradient caching: one contrastive step over a batch of any size, in the memory of a micro-batch.

The loss needs all vectors of a batch, but not all activations of the tower (arXiv 2101.06983). So vectors are made
first, without activations; the loss gives the derivative by each vector; then every micro-batch runs again, with
activations, and its vectors' derivatives go back through it. Loss and gradients are those of the plain step: dropout
and everything else that draws random numbers draws the same ones both times.

Layers that mix the images of a batch (BatchNorm in training) see micro-batches. In FSDP2 each micro-batch gathers
and frees the weights, as each forward does; gradients are reduced once, with the last one, and until then every
process holds them whole.

Letters: b images in a micro-batch, m captions an image, n all images of this process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MicroBatch = tuple[Tensor, Tensor]


def cached_step(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    loss_fn: Callable[..., Tensor],
    accelerator: Any,
    *,
    weight: float = 1.0,
    sync: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds to the parameters' `.grad` what `loss_fn` on the vectors of all micro-batches together brings.

    With one micro-batch, that is the plain step. Gradients are averaged over processes once. Processes may have other
    numbers of micro-batches under DDP, but not under FSDP2, whose every forward gathers weights from all of them.

    Args:
        model: the student as accelerate prepared it; called with a micro-batch, it returns (image [b, D],
            text [b * m, D], scale []), for the sigmoid loss also a bias.
        micro_batches: (images [b, 3, H, W], teacher vectors [b * m, T]), at least one.
        loss_fn: gets (image [n, D], text [n * m, D], scale) and the bias if there is one; returns the loss [].
        accelerator: does backward (loss scaling included) and data parallel bookkeeping.
        weight: multiplies the gradients; 1 / k for the mean over k accumulated batches.
        sync: average gradients over processes; False for all but the last of accumulated batches.

    Returns:
        The loss [], and {"image", "text", "scale" and perhaps "bias"}: what `loss_fn` was given. All detached.
    """
    *early, final = micro_batches
    parts, states = [], []
    with torch.no_grad():
        for micro_batch in early:
            states.append(_random_state(accelerator.device))
            parts.append(tuple(model(*micro_batch)))
    with contextlib.nullcontext() if sync and not early else accelerator.no_sync(model):
        parts.append(tuple(model(*final)))  # keeps its activations: it need not run twice
    after = _random_state(accelerator.device)
    vectors = [torch.cat([part[i].detach() for part in parts]).requires_grad_() for i in (0, 1)]
    scalars = [value.detach().requires_grad_() for value in parts[-1][2:]]
    loss = loss_fn(*vectors, *scalars)
    by_image, by_text, *by_scalars = torch.autograd.grad(loss * weight, [*vectors, *scalars])
    derivatives = list(
        zip(
            by_image.split([len(part[0]) for part in parts]),
            by_text.split([len(part[1]) for part in parts]),
            strict=True,
        )
    )
    # The final one goes first and frees its activations. Whichever is last takes the derivatives by the scalars too:
    # averaging over processes starts in that backward and waits until every parameter has had its part.
    for i in (len(early), *range(len(early))):
        last = i == max(0, len(early) - 1)
        with contextlib.nullcontext() if last and sync else accelerator.no_sync(model):
            if i < len(early):
                _set_random_state(accelerator.device, states[i])
                parts[i] = tuple(model(*early[i]))
            _push_back(accelerator, parts[i], (*derivatives[i], *(by_scalars if last else ())))
        parts[i] = ()
    _set_random_state(accelerator.device, after)
    names = ("image", "text", "scale", "bias")
    return loss.detach(), {name: v.detach() for name, v in zip(names, (*vectors, *scalars), strict=False)}


def _push_back(accelerator: Any, values: tuple[Tensor, ...], derivatives: tuple[Tensor, ...]) -> None:
    """Backward from `values`, as if a loss had these derivatives by them; values without one get none."""
    surrogate = torch.stack([(v * d).sum() for v, d in zip(values, derivatives, strict=False)]).sum()
    accelerator.backward(surrogate)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where the random generators of the CPU and of `device` stand."""
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), on_device


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)
