"""`--compile`: the flag reaches torch.compile, and what is learned, saved and gone on from is the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2clip.errors import UsageError
from llm2clip.student import train
from llm2clip.student.config import StudentConfig
from llm2clip.student.train import train_student

from .banks import image_samples, log, small_run, write_test_bank
from .forks import side_by_side


@pytest.fixture(scope="module")
def settings(tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("banks")
    bank = write_test_bank(folder / "bank", image_samples(folder / "images", 24)).folder
    return small_run(bank, tiny_tower)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.compile was given, with a backend that needs no compiler."""
    from torch._dynamo.backends.debugging import aot_eager

    seen: list[Any] = []
    real = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend=backend))
    torch._dynamo.reset()
    return seen


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log(out) if "loss" in line]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"micro_batch_size": 3, "patch_dropout": 0.5}, marks=pytest.mark.ci),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.ci),
        pytest.param({"lora_rank": 2, "ema": 0.9}, marks=pytest.mark.ci),
        {"adaptor_warmup_steps": 3},
    ],
    ids=str,
)
def test_a_compiled_tower_learns_the_same(settings, graphs, changes, tmp_path) -> None:
    plain, compiled = (
        train_student(StudentConfig(**settings, **changes, compile=flag, out=tmp_path / str(flag)))
        for flag in (False, True)
    )
    assert any("conv2d" in str(node.target) for graph in graphs for node in graph.graph.nodes), "it was not compiled"
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    one, two = (load_file(folder / "model.safetensors") for folder in (plain, compiled))
    assert list(one) == list(two)
    recomputed = [node for graph in graphs for node in graph.graph.nodes if "checkpoint" in str(node.target)]
    assert len(recomputed) == (2 if "gradient_checkpointing" in changes else 0), "one a block"


@pytest.mark.slow
@pytest.mark.own_process
def test_two_processes_with_a_compiled_tower_learn_the_same(settings, graphs, tmp_path) -> None:
    changes = {"gradient_checkpointing": True, "micro_batch_size": 2}
    plain, compiled = (
        StudentConfig(**settings, **changes, compile=flag, out=tmp_path / str(flag)) for flag in (False, True)
    )
    train_student(plain)
    assert side_by_side(2, tmp_path / "meeting", lambda rank: train_student(compiled)) == [(0, "")] * 2
    assert losses(compiled.out) == pytest.approx(losses(plain.out), abs=1e-5)


@pytest.mark.ci
def test_a_killed_run_goes_on_compiled_or_not(settings, graphs, tmp_path, monkeypatch) -> None:
    """Checkpoints name the weights alike, so --compile may be added or left out on the way."""
    settings = {**settings, "save_every": 2, "ema": 0.9}
    whole = train_student(StudentConfig(**settings, out=tmp_path / "whole"))
    real = train.train_step
    for flag in (False, True):
        out = tmp_path / str(flag)

        def dies(run, batches):
            if run.step == 4:
                raise KeyboardInterrupt
            return real(run, batches)

        monkeypatch.setattr(train, "train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train_student(StudentConfig(**settings, compile=flag, out=out))
        monkeypatch.setattr(train, "train_step", real)
        train_student(StudentConfig(**settings, compile=not flag, out=out))
        one, two = (load_file(folder / "model.safetensors") for folder in (whole, out))
        assert list(one) == list(two)
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)


def test_a_machine_that_cannot_compile_is_one_line(settings, tmp_path, monkeypatch) -> None:
    def no_compiler(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: no_compiler)
    with pytest.raises(UsageError, match=r"^compile does not work here \(No working C\+\+ compiler found\)"):
        train_student(StudentConfig(**settings, compile=True, out=tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_the_real_compiler_learns_the_same_and_drops_the_same_patches(settings, tmp_path) -> None:
    torch._dynamo.reset()
    settings = {**settings, "micro_batch_size": 3, "patch_dropout": 0.5}
    plain, compiled = (
        train_student(StudentConfig(**settings, compile=flag, out=tmp_path / str(flag))) for flag in (False, True)
    )
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
