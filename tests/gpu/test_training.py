"""What a run does on a GPU beside the arithmetic: random numbers, the compiler, averages, going on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llm2clip.student import gradcache, train
from llm2clip.student.accelerator import start_accelerator
from llm2clip.student.ema import Average
from llm2clip.student.gradcache import cached_step
from llm2clip.student.loss import contrastive_loss
from llm2clip.student.optim import MuonAndAdamW
from llm2clip.student.session import Session
from llm2clip.student.train import train_student
from llm2clip.teacher import mntp
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.train import train_teacher
from llm2clip.teacher.trainer import PairTrainer

from .place import FP16_TRAINING, ON_GPU, losses, on_the_device

pytestmark = pytest.mark.gpu
Make = Callable[..., Any]


def session_that_drops(config: Any) -> Session:
    """A run whose tower draws on the device: it drops patches, and weights of attention."""
    run = Session(config, start_accelerator(config))
    for module in run.student.tower.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.3
    return run


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


# fp32: sums in another order. bf16: each micro-batch's gradients are rounded to 8 bits before they are added.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_a_cached_step_is_the_plain_one(
    precision: str, tolerance: float, student_config: Make, full_precision: None
) -> None:
    """Both draw the same numbers on the device, and leave its generator at the same place."""
    run = session_that_drops(student_config("student", precision=precision, patch_dropout=0.5, loss="sigmoid"))
    (batch,) = next(run.batches())
    assert batch.pixels.device.type == run.accelerator.device.type
    parts = list(zip(batch.pixels.split(3), batch.text_embeds.split(3), strict=True))

    def loss_fn(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return contrastive_loss(image, text, scale, bias, kind="sigmoid", rows=batch.rows)

    torch.manual_seed(5)
    vectors = [run.model(*part) for part in parts]
    plain = loss_fn(*(torch.cat([part[i] for part in vectors]) for i in (0, 1)), *vectors[-1][2:])
    plain.backward()
    wanted, then = gradients(run.student), torch.rand(4, device=batch.pixels.device)
    torch.manual_seed(5)
    cached, _ = cached_step(run.model, parts, loss_fn, run.accelerator)
    found = gradients(run.student)
    assert torch.equal(torch.rand(4, device=batch.pixels.device), then)
    torch.testing.assert_close(cached, plain.detach(), rtol=1e-5, atol=0)
    assert found.keys() == wanted.keys()
    scale = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():  # some, as that of k_proj.bias, are nothing but rounding
        assert (found[name] - gradient).norm() < tolerance * max(gradient.norm(), 1e-3 * scale), name


def test_the_devices_random_state_is_captured_and_restored(device: torch.device) -> None:
    state = gradcache._random_state(device)
    on_device, on_cpu = torch.rand(4, device=device), torch.rand(4)
    torch.rand(7, device=device)
    gradcache._set_random_state(device, state)
    assert torch.equal(torch.rand(4, device=device), on_device)
    if ON_GPU:  # else it is the same generator
        assert torch.equal(torch.rand(4), on_cpu)


def test_an_average_lies_beside_the_weights(device: torch.device) -> None:
    """Begun on the CPU, it follows the weights to the device and says what one on the CPU says."""
    models = [nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    averages = [Average(model, decay=0.9) for model in models]
    models[1].to(device)
    for step in range(5):
        for model, average in zip(models, averages, strict=True):
            torch.manual_seed(step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape).to(parameter.device))
            average.update(model)
    for name, parameter in models[1].named_parameters():
        assert averages[1].values[name].device == parameter.device
        torch.testing.assert_close(averages[1].values[name].cpu(), averages[0].values[name])
    own = models[1][0].weight.detach().clone()
    with averages[1].applied(models[1]):
        torch.testing.assert_close(models[1][0].weight.cpu(), averages[0].values["0.weight"])
    assert torch.equal(models[1][0].weight, own)


def test_muon_takes_the_steps_it_takes_on_a_cpu(device: torch.device) -> None:
    """It orthogonalises in bf16 on a GPU, of 8 bits: five rounds differ by some hundredths in single numbers."""
    start, ends = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), []
    for place in ("cpu", device):
        weight, bias = nn.Parameter(start.to(place, copy=True)), nn.Parameter(torch.zeros(32, device=place))
        optimizer = MuonAndAdamW([{"params": [weight], "lr": 0.1}], [{"params": [bias], "lr": 0.1}])
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            weight.grad = torch.randn(16, 32, generator=generator).to(place)
            bias.grad = torch.randn(32, generator=generator).to(place)
            optimizer.step()
        ends.append((weight.detach().cpu() - start, bias.detach().cpu()))
    assert (ends[1][0] - ends[0][0]).norm() < 0.03 * ends[0][0].norm()
    torch.testing.assert_close(ends[1][1], ends[0][1])


def test_the_first_step_of_a_frozen_teacher_trains_float32(
    tiny_llm: Path, images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in half precision lose small steps in bf16, and in fp16 cannot have their loss scaled."""
    trained: list[set[torch.dtype]] = []
    real = mntp.run_trainer

    def watched(trainer: Any, **options: Any) -> None:
        trained.append({parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad})
        real(trainer, **options)

    monkeypatch.setattr(mntp, "run_trainer", watched)
    settings = {"data": (str(images_csv),), "model": str(tiny_llm), "steps": 2, "batch_size": 4, "mntp_batch_size": 4}
    settings |= {"precision": "bf16", "tuning": "frozen", "adaptor_layers": 1, "mntp": True, "mntp_steps": 2}
    out = train_teacher(TeacherConfig(**settings, out=tmp_path / "teacher"))
    assert trained == [{torch.float32}]
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("fp32", {"micro_batch_size": 3, "patch_dropout": 0.5, "ema": 0.9}),
        ("bf16", {"optimizer": "muon", "loss": "sigmoid", "workers": 1}),
        pytest.param("fp16", {"micro_batch_size": 4, "lora_rank": 2}, marks=FP16_TRAINING.marks),
    ],
    ids=str,
)
def test_a_killed_student_goes_on_exactly(
    precision: str, settings: dict, student_config: Make, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: a step depends on the checkpoint, the seed and its number alone, and kernels add in one order here.

    Without `deterministic`, atomic additions make any two runs on a GPU differ in the last digits, killed or not.
    """
    settings = {**settings, "precision": precision, "save_every": 2}
    whole = train_student(student_config("whole", **settings))
    real = train.train_step

    def dies(run: Session, batches: Any) -> Any:
        if run.step == 4:
            raise KeyboardInterrupt
        return real(run, batches)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_student(student_config("killed", **settings))
    monkeypatch.setattr(train, "train_step", real)
    with on_the_device():
        killed = train_student(student_config("killed", **settings))
    assert losses(killed) == losses(whole)
    assert weights_of(killed) == weights_of(whole)


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


class KillAt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed


@pytest.mark.parametrize("precision", ["fp32", FP16_TRAINING])
def test_a_killed_teacher_goes_on_exactly(
    precision: str,
    tiny_llm: Path,
    images_csv: Path,
    tmp_path: Path,
    deterministic: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, as above; with dropout in the adapters, whose random state the checkpoint holds."""
    shared: dict[str, Any] = {"data": (str(images_csv),), "model": str(tiny_llm), "steps": 8, "batch_size": 6}
    shared |= {"precision": precision, "learning_rate": 5e-3, "save_every": 3, "micro_batch_size": 8}
    whole = train_teacher(TeacherConfig(**shared, out=tmp_path / "whole"))
    original = PairTrainer.__init__

    def killed(self: PairTrainer, **kwargs: Any) -> None:
        original(self, **{**kwargs, "callbacks": [KillAt()]})

    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "__init__", killed)
        with pytest.raises(Killed):
            train_teacher(TeacherConfig(**shared, out=tmp_path / "killed"))
    with on_the_device():
        resumed = train_teacher(TeacherConfig(**shared, out=tmp_path / "killed"))
    assert losses(resumed) == losses(whole)
    assert weights_of(resumed) == weights_of(whole)
