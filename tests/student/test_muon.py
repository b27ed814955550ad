"""Muon against its formula in double precision, and against PyTorch's in bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llm2clip.student.muon import Muon

SHAPES = ((6, 6), (12, 5), (5, 12))


def gradients(step: int) -> list[torch.Tensor]:
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + i)) for i, shape in enumerate(SHAPES)
    ]


def take_steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    for step in range(3):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        optimizer.step()


def start() -> list[nn.Parameter]:
    return [nn.Parameter(gradient.clone()) for gradient in gradients(9)]


@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
def test_its_steps_are_those_of_the_formula_by_singular_values(rule: str) -> None:
    """Newton-Schulz moves singular values alone: s -> a s + b s^3 + c s^5, five times, from s / (norm of all)."""
    weights, rate, decay = start(), 0.01, 0.1
    take_steps(Muon(weights, lr=rate, weight_decay=decay, adjust_lr_fn=rule), weights)
    for i, (shape, got) in enumerate(zip(SHAPES, weights, strict=True)):
        wanted, mean = start()[i].detach().double(), torch.zeros(shape).double()
        for step in range(3):
            gradient = gradients(step)[i].double()
            mean = 0.95 * mean + 0.05 * gradient
            left, values, right = torch.linalg.svd(0.05 * gradient + 0.95 * mean, full_matrices=False)
            values = values / values.norm()
            for _ in range(5):
                values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
            size = 0.2 * math.sqrt(max(shape)) if rule == "match_rms_adamw" else math.sqrt(max(1, shape[0] / shape[1]))
            wanted = wanted * (1 - rate * decay) - rate * size * (left * values @ right)
        torch.testing.assert_close(got.detach().double(), wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
def test_pytorchs_own_are_the_same_within_bf16_and_take_its_state(rule: str) -> None:
    ours, theirs = start(), start()
    optimizer, peer = Muon(ours, lr=0.01, adjust_lr_fn=rule), torch.optim.Muon(theirs, lr=0.01, adjust_lr_fn=rule)
    take_steps(optimizer, ours)
    take_steps(peer, theirs)
    for first, got, wanted in zip(start(), ours, theirs, strict=True):
        assert (got - wanted).norm() < 0.03 * (wanted - first).norm()
    optimizer.load_state_dict(peer.state_dict())
    for weight, state in zip(ours, peer.state.values(), strict=True):
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], state["momentum_buffer"])


def test_what_has_no_gradient_stays_and_a_closure_gives_its_loss() -> None:
    moved, stays = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))

    def closure() -> torch.Tensor:
        loss = moved.square().sum()
        loss.backward()
        return loss

    assert Muon([moved, stays], lr=0.1).step(closure).item() == 3
    assert torch.equal(stays, torch.eye(3)) and moved[0, 0] < 1
