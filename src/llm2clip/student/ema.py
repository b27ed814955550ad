"""A running average of a student's weights, often better than the last ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

COUNT = "num_updates"


class Average:
    """Exponential moving average of all parameters, `average = decay * average + (1 - decay) * weights` a step.

    The first updates use a smaller decay, (1 + n) / (10 + n), so that a short run does not end near the random
    weights it began with.

    Args:
        model: the average starts as a copy of its parameters, and follows them to other devices and into shards.
        decay: per step, below 1; 0.9999 averages over about the last 10,000 steps.

    Attributes:
        values: the averages by parameter name, and the number of updates: all that a checkpoint must hold.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = Average(model, decay=0.9999)
        >>> average.update(model)  # after each optimizer step
        >>> with average.applied(model):
        ...     state = model.state_dict()  # the averaged weights, to be saved or scored
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.values[COUNT] = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Let the average follow the weights by one step."""
        num_updates = int(self.values[COUNT])
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        self._follow(model)
        weights = dict(model.named_parameters())
        averages = [self.values[name] for name in weights]
        get_ema_multi_avg_fn(decay)(averages, [p.detach() for p in weights.values()], num_updates)
        self.values[COUNT].add_(1)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it, `model` has the averaged weights; afterwards its own again."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _follow(self, model: nn.Module) -> None:
        """Go where the model's parameters have gone since: to another device, into the shards of FSDP2."""
        for name, parameter in model.named_parameters():
            value = self.values[name].to(parameter.device)
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            self.values[name] = value

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        self._follow(model)
        for name, parameter in model.named_parameters():
            own = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(own)
