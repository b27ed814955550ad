"""Muon (arXiv 2502.16982), as PyTorch has it, at a speed that a CPU can bear."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with Nesterov's momentum, which orthogonalises in float32 where there is no GPU.

    PyTorch's own does so in bfloat16 everywhere; a CPU without bf16 arithmetic emulates that, some thirty times slower.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of each matrix that has a gradient; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        rate, kept, (rows, columns) = group["lr"], group["momentum"], parameter.shape
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - kept)
        update = orthogonalised(gradient.lerp(mean, kept), group["ns_coefficients"], group["ns_steps"])
        as_adamw = group["adjust_lr_fn"] == "match_rms_adamw"
        size = 0.2 * math.sqrt(max(rows, columns)) if as_adamw else math.sqrt(max(1, rows / columns))
        parameter.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * size)


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """[A, B]: a matrix of the same singular vectors whose singular values are near 1, by Newton-Schulz.

    >>> orthogonalised(torch.diag(torch.tensor([3.0, 5.0])), (1.5, -0.5, 0.0), 20).round(decimals=4)
    tensor([[1., 0.],
            [0., 1.]])
    """
    a, b, c = coefficients
    found = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    upright = matrix.shape[0] > matrix.shape[1]
    found = found.T if upright else found
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if upright else found
