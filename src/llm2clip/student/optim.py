"""The optimizer of a student: who decays, who learns how fast, AdamW or Muon, and the schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from llm2clip.student.model import Student
from llm2clip.student.muon import Muon
from llm2clip.student.tower import tower_blocks

ADAMW_BETAS, ADAMW_EPS = (0.9, 0.999), 1e-8
"""PyTorch's; what the released code ends up with for the EVA02 towers of the paper."""


def build_optimizer(
    student: Student,
    *,
    kind: str = "adamw",
    learning_rate: float = 1e-5,
    fresh_learning_rate: float | None = None,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer of every parameter that learns: AdamW, or Muon for hidden matrices and AdamW for the rest.

    Muon (arXiv 2502.16982) takes the matrices inside transformer blocks and inside the adaptor's blocks; embeddings,
    norms, projections into the shared space and convolutions stay with AdamW. Learning rates and weight decay mean the
    same for both.

    Args:
        student: what is not its tower counts as fresh.
        kind: "adamw" or "muon".
        learning_rate: peak rate of the tower's last layers.
        fresh_learning_rate: peak rate of adaptor, projection, scale and bias; None takes `learning_rate`.
        weight_decay: of weight matrices and convolutions; see `decays`.
        layer_decay: each tower block learns this much slower than what follows it, as in EVA-CLIP (0.85 there).

    Example:
        >>> student = nn.Module()
        >>> student.tower = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> [group["lr"] for group in build_optimizer(student, learning_rate=1.0, layer_decay=0.5).param_groups]
        [0.25, 0.25, 0.5, 0.5]
    """
    decayed = decays(student)
    slower = tower_learning_rates(student.tower, layer_decay=layer_decay)
    hidden = _hidden_matrices(student, decayed) if kind == "muon" else set()
    fresh = learning_rate if fresh_learning_rate is None else fresh_learning_rate
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            tower_name = name.removeprefix("tower.")
            rate = learning_rate * slower[tower_name] if tower_name != name else fresh
            key = (name in hidden, rate, weight_decay if name in decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
    hidden_groups, other_groups = (
        [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (is_hidden, rate, decay), parameters in groups.items()
            if is_hidden is wanted
        ]
        for wanted in (True, False)
    )
    optimizer = MuonAndAdamW(hidden_groups, other_groups) if hidden_groups else _adamw(other_groups)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]  # what the schedule multiplies
    return optimizer


class MuonAndAdamW(torch.optim.Optimizer):
    """`Muon` and `torch.optim.AdamW` as one optimizer.

    One, because accelerate's loss scaler for fp16 moves on after each optimizer's step: a second one would have its
    gradients scaled down twice. Groups and state of the two are those of this one.

    Args:
        hidden_groups: parameter groups of matrices, for Muon.
        other_groups: parameter groups for AdamW.
    """

    def __init__(self, hidden_groups: list[dict[str, Any]], other_groups: list[dict[str, Any]]) -> None:
        # Scaled to the size of AdamW's updates (arXiv 2502.16982, equation 4): rates mean the same for both.
        self.muon = Muon(hidden_groups, adjust_lr_fn="match_rms_adamw")
        self.adamw = _adamw(other_groups)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self.defaults = {"fused": True}  # where AdamW's step counts lie depends on it
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of both; `closure` computes the loss anew."""
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take groups and state of both from `state_dict`."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        number = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:number], self.param_groups[number:]
        self.muon.state = self.adamw.state = self.state


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    # Fused: one kernel for all parameters, where the plain loop takes several for each.
    return torch.optim.AdamW(groups, betas=ADAMW_BETAS, eps=ADAMW_EPS, fused=True)


def decays(model: nn.Module) -> set[str]:
    """Names of the parameters with weight decay: weights of linear layers, attention and convolutions.

    Not so biases, norms, layer scales, the temperature, class and register tokens, position tables, pooling queries.

    >>> decays(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(5, 3)))
    {'0.weight'}
    """
    tables = {
        f"{name}.weight".removeprefix(".") for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name.endswith("weight") and name not in tables
    }


def tower_learning_rates(tower: nn.Module, *, layer_decay: float) -> dict[str, float]:
    """By how much each of the tower's parameters learns slower: `layer_decay ** (layers after it)`.

    What comes before the blocks (patches, positions) is one layer, each block one, what follows them (last norm,
    pooling head) the last one, at full rate.

    >>> tower_learning_rates(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), layer_decay=0.5)
    {'0.weight': 0.25, '1.weight': 0.5}
    """
    blocks = [name for name, _ in tower_blocks(tower)]
    rates, depth = {}, 0
    for name, _ in tower.named_parameters():
        inside = next(
            (i for i, block in enumerate(blocks, start=1) if name.startswith(f"{block.removeprefix('.')}.")), None
        )
        if inside is not None:
            depth = inside
        elif depth:  # modules are named in the order of their definition: past the blocks, that is after them
            depth = len(blocks) + 1
        rates[name] = layer_decay ** (len(blocks) + 1 - depth)
    return rates


def cosine_factor(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """What multiplies peak learning rates at `step` (from 0): a linear rise, then a cosine that ends at 0.

    Also a `torch.optim.lr_scheduler.LambdaLR` function, by `functools.partial`.

    >>> [round(cosine_factor(step, 6, 2), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 + math.cos(math.pi * min(1.0, progress))) / 2


def _hidden_matrices(student: Student, decayed: set[str]) -> set[str]:
    """Names of the matrices between hidden states: in the blocks of tower and adaptor."""
    prefixes = (*(f"tower.{name}." for name, _ in tower_blocks(student.tower)), "adaptor.blocks.")
    return {
        name for name, p in student.named_parameters() if p.ndim == 2 and name in decayed and name.startswith(prefixes)
    }
