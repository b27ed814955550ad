"""Gradient caching equals the plain step: loss, gradients, randomness; on one process and across processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm2clip.student.gradcache import _random_state, _set_random_state, cached_step
from llm2clip.student.loss import contrastive_loss


class Toy(nn.Module):
    """A student in small, with dropout if asked for, that counts its forward passes."""

    def __init__(self, *, dropout: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 8))
        self.adaptor = nn.Linear(6, 8)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        self.logit_bias = nn.Parameter(torch.tensor([-2.0])) if bias else None
        self.num_forwards = 0

    def forward(self, pixels: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        self.num_forwards += 1
        image = nn.functional.normalize(self.tower(pixels).float(), dim=-1)
        text = nn.functional.normalize(self.adaptor(rows).float(), dim=-1)
        scalars = (self.logit_scale.exp()[0],) + (() if self.logit_bias is None else (self.logit_bias[0],))
        return image, text, *scalars


def softmax(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(image, text, scale, tile=4)


def sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return contrastive_loss(image, text, scale, bias=bias, kind="sigmoid", tile=4)


def data(number: int = 10) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randn(number, 3, 2, 2), torch.randn(number, 6)


def split(batch: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


def assert_close(got: Tensor, wanted: Tensor, *, relative: float = 1e-5) -> None:
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < relative, f"relative error {error:.2e}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def accelerator(**options: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


@pytest.mark.parametrize("size", [1, 3, 5, 9, 10, 50])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_step(size: int, bias: bool) -> None:
    loss_fn = sigmoid if bias else softmax
    plain, cached = Toy(bias=bias), Toy(bias=bias)
    wanted = loss_fn(*plain(*data()))
    wanted.backward()
    runner = accelerator()
    batches = split(data(), size)
    loss, values = cached_step(runner.prepare_model(cached), batches, loss_fn, runner)
    assert_close(loss, wanted.detach())
    assert not loss.requires_grad
    assert set(values) == {"image", "text", "scale"} | ({"bias"} if bias else set())
    torch.testing.assert_close(values["image"], plain(*data())[0].detach())
    for name, gradient in gradients(plain).items():
        assert_close(gradients(cached)[name], gradient)
    assert cached.num_forwards == 2 * len(batches) - 1  # the last micro-batch runs once


def test_dropout_is_the_same_in_both_passes() -> None:
    """Every micro-batch must drop in its second pass what it dropped in its first, and the generator ends where a
    plain step, micro-batch after micro-batch, would leave it."""
    plain, cached = Toy(dropout=0.5), Toy(dropout=0.5)
    batches = split(data(), 3)
    torch.manual_seed(3)
    parts = [plain(*batch) for batch in batches]
    image, text = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    softmax(image, text, parts[0][2]).backward()
    then = torch.rand(4)
    runner = accelerator()
    torch.manual_seed(3)
    _, values = cached_step(runner.prepare_model(cached), batches, softmax, runner)
    assert torch.equal(torch.rand(4), then)
    assert torch.equal(values["image"], image)
    for name, gradient in gradients(plain).items():
        assert_close(gradients(cached)[name], gradient)


def test_gradients_of_accumulated_batches_add_up() -> None:
    plain, cached = Toy(), Toy()
    halves = split(data(), 5)
    for half in halves:
        (softmax(*plain(*half)) / 2).backward()
    runner = accelerator()
    model = runner.prepare_model(cached)
    for i, half in enumerate(halves):
        cached_step(model, split(half, 2), softmax, runner, weight=0.5, sync=i == 1)
    for name, gradient in gradients(plain).items():
        assert_close(gradients(cached)[name], gradient)


def test_under_autocast_it_equals_autocast() -> None:
    plain, cached = Toy(), Toy()
    runner = accelerator(mixed_precision="bf16")
    plain_model, model = runner.prepare_model(plain), runner.prepare_model(cached)
    wanted = softmax(*plain_model(*data()))
    runner.backward(wanted)
    loss, _ = cached_step(model, split(data(), 4), softmax, runner)
    assert_close(loss, wanted.detach())
    for name, gradient in gradients(plain).items():
        assert_close(gradients(cached)[name], gradient, relative=2e-2)  # bf16 rounds sums over micro-batches


def test_a_loss_scaler_scales_the_gradients_once() -> None:
    plain, cached = Toy(), Toy()
    softmax(*plain(*data())).backward()
    runner = accelerator()
    runner.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, _ = cached_step(runner.prepare_model(cached), split(data(), 4), softmax, runner)
    assert_close(loss, softmax(*plain(*data())).detach())
    for name, gradient in gradients(plain).items():
        assert_close(gradients(cached)[name], 1024 * gradient)


def test_the_random_state_of_a_device_goes_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws on the device: a stand-in for it has a generator of its own."""
    generator, device = torch.Generator().manual_seed(1), torch.device("cuda", 1)

    class Cuda:
        @staticmethod
        def get_rng_state(of: torch.device) -> Tensor:
            assert of == device
            return generator.get_state()

        @staticmethod
        def set_rng_state(state: Tensor, of: torch.device) -> None:
            assert of == device
            generator.set_state(state)

    monkeypatch.setattr(torch, "get_device_module", lambda of: Cuda)
    state = _random_state(device)
    first = torch.rand(3), torch.rand(3, generator=generator)
    _set_random_state(device, state)
    assert torch.equal(torch.rand(3), first[0])
    assert torch.equal(torch.rand(3, generator=generator), first[1])


class ShardingRunner:
    """The part of accelerate's Accelerator that a step needs under FSDP2, which accelerate has on no CPU."""

    device = torch.device("cpu")

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def _process(folder: str) -> None:
    """What each of two processes does with five images, in micro-batches; under DDP in other numbers of them."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.fsdp import fully_shard

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    pixels, rows = (part[slice(0, 5) if rank == 0 else slice(5, 10)] for part in data())
    runner, results, num_reductions = accelerator(), [], []
    for size, bias in itertools.product((2, 100), (False, True)):
        model = runner.prepare_model(Toy(bias=bias))
        calls: list[Any] = []
        model.register_comm_hook(calls, lambda calls, bucket: calls.append(bucket) or allreduce_hook(None, bucket))
        loss, _ = cached_step(model, split((pixels, rows), size + rank), sigmoid if bias else softmax, runner)
        results.append((loss, gradients(model)))
        num_reductions.append(len(calls))
    for bias in (False, True):
        model = Toy(bias=bias)
        fully_shard(model.tower[1])
        fully_shard(model)
        loss, _ = cached_step(model, split((pixels, rows), 2), sigmoid if bias else softmax, ShardingRunner())
        results.append((loss, {name: gradient.full_tensor() for name, gradient in gradients(model).items()}))
    torch.save((results, num_reductions), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.ci
def test_two_processes_equal_one_and_reduce_once(tmp_path: Path) -> None:
    """Under DDP, in several micro-batches and in one, and in the shards of FSDP2."""
    # The processes meet at a file; accelerate only wants to see the last two set.
    names = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    environments = [{**os.environ, **names, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=each) for each in environments]
    assert [process.wait() for process in processes] == [0, 0]
    for rank in range(2):
        results, num_reductions = torch.load(tmp_path / f"{rank}.pt")
        assert num_reductions == [1, 1, 1, 1]
        for bias, (loss, got) in zip([False, True] * 3, results, strict=True):
            plain = Toy(bias=bias)
            wanted = (sigmoid if bias else softmax)(*plain(*data()))
            wanted.backward()
            assert_close(loss, wanted.detach())
            for name, gradient in gradients(plain).items():
                assert_close(got[name], gradient)


if __name__ == "__main__":
    _process(sys.argv[1])
