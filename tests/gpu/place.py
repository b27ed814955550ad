"""Where the tests of this folder run: on a GPU, or as LLM2CLIP_TEST_DEVICE=cpu says, on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from llm2clip import cli

DEVICE = os.environ.get("LLM2CLIP_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"
NO_GPU = "no CUDA device: set LLM2CLIP_TEST_GPUS=0 where there is one, LLM2CLIP_TEST_DEVICE=cpu to run this on the CPU"


def gpu_only(reason: str) -> pytest.MarkDecorator:
    """Skips a test that has no meaning on a CPU."""
    return pytest.mark.skipif(not ON_GPU, reason=reason)


FP16_TRAINING = pytest.param("fp16", marks=gpu_only("training in fp16 needs a GPU"))


@contextlib.contextmanager
def on_the_device() -> Iterator[None]:
    """Fails if what runs within leaves the GPU alone."""
    if not ON_GPU:
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    assert torch.cuda.max_memory_allocated() > before, "nothing was put on the GPU"


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Within it, what picks its device by itself finds no GPU, as on a machine without one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def command(*words: object) -> None:
    """Run a command; it must succeed."""
    assert cli.run([str(word) for word in words]) == 0


def verb(*words: object) -> None:
    """Run a command that computes on the device."""
    with on_the_device():
        command(*words)


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return words


def lines_of(log: Path, name: str = "loss") -> list[dict[str, Any]]:
    """The lines of a log that tell `name`."""
    return [line for line in map(json.loads, log.read_text().splitlines()) if name in line]


def losses(out: Path) -> list[float]:
    """The loss of each step of a run."""
    return [line["loss"] for line in lines_of(out / "log.jsonl")]
