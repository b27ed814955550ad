"""Out of memory: one line that names the setting to lower, and lowered it fits. On a GPU the memory is really short."""

from __future__ import annotations

import csv
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from llm2clip import cli
from llm2clip.bank.reader import Bank
from llm2clip.bank.verify import cosines

from .place import ON_GPU, command, flags, gpu_only

pytestmark = pytest.mark.gpu
SIDE = 448 if ON_GPU else 32
WORDS = 500 if ON_GPU else 20
MIB = 2**20
SAID_BY_TORCH = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB of which 0 bytes"
)


@pytest.fixture
def models_take_at_most() -> Iterator[Callable[..., None]]:
    """A function: from here on models say, from within their forward, that more images or tokens are too many."""
    handles = []

    def limit(*, images: float = float("inf"), tokens: float = float("inf")) -> None:
        def check(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            too_many = type(module) is nn.Conv2d and len(inputs[0]) > images
            if too_many or (type(module) is nn.Embedding and inputs[0].numel() > tokens):
                raise torch.OutOfMemoryError(SAID_BY_TORCH)

        handles.append(nn.modules.module.register_module_forward_pre_hook(check))

    yield limit
    for handle in handles:
        handle.remove()


@pytest.fixture
def short_of_memory(models_take_at_most: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """A function: from here on the GPU has that many MiB to give; models on a CPU say so by themselves."""

    def limit(mib: int, **counts: int) -> None:
        if not ON_GPU:
            models_take_at_most(**counts)
            return
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mib * MIB) / total)

    yield limit
    if ON_GPU:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


def last_line(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says last that fails for want of memory."""
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    gc.collect()  # what hangs together in circles; a command in its own process leaves nothing
    assert line.startswith("llm2clip: error: ")
    assert "out of memory. Tried to allocate" in line and "GPU 0" not in line and "Traceback" not in line
    return line


@pytest.fixture
def long_csv(tmp_path: Path) -> Callable[[int], Path]:
    """A function: a CSV of that many images of one pixel with two long captions each."""

    def write(count: int) -> Path:
        words = "red green blue yellow small large disc square".split()
        path = tmp_path / "long.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "short_caption", "long_caption"])
            for i in range(count):
                text = " ".join(words[(i // 8 ** (k % 4) + k) % 8] for k in range(WORDS))
                Image.new("L", (1, 1)).save(tmp_path / f"{i}.png")
                rows.writerow([f"{i}.png", f"{text} a", f"{text} the"])
        return path

    return write


def test_train_student(
    bank: Path, tiny_tower: Path, tmp_path: Path, short_of_memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"tower": tiny_tower, "out": tmp_path / "student", "image_size": SIDE, "batch_size": 24, "steps": 2}
    words = [
        "train-student",
        "--bank",
        bank,
        *flags({**settings, "precision": "fp32", "tracker": "none", "workers": 0}),
    ]
    short_of_memory(192, images=4)  # the step takes 340, two images of it 28; two batches 37; torch's products 32
    line = last_line(capsys, *words)
    assert "; give a small --micro-batch-size or --gradient-checkpointing or a smaller --batch-size (now 24)" in line
    if not ON_GPU:
        line = last_line(capsys, *words, "--micro-batch-size", 6, "--gradient-checkpointing")
        assert "; give a smaller --micro-batch-size (now 6) or a smaller --batch-size (now 24)" in line
    command(*words, "--micro-batch-size", 2)  # in the same folder, with what had been read and written


def test_train_teacher(
    tiny_llm: Path, long_csv: Any, tmp_path: Path, short_of_memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"model": tiny_llm, "out": tmp_path / "teacher", "precision": "fp32", "batch_size": 24, "steps": 2}
    words = ["train-teacher", "--data", long_csv(24), *flags({**settings, "eval_images": 2})]
    short_of_memory(128, tokens=8 * (WORDS + 2))  # the step takes 260 MiB, two texts of it 8
    assert "; give a smaller --micro-batch-size, --gradient-checkpointing or, for" in last_line(capsys, *words)
    command(*words, "--micro-batch-size", 2)


def test_the_first_step_of_a_teacher(
    tiny_llm: Path, long_csv: Any, tmp_path: Path, models_take_at_most: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads so many texts at once as --mntp-batch-size says, whatever --micro-batch-size."""
    settings = {"model": tiny_llm, "out": tmp_path / "teacher", "precision": "fp32", "batch_size": 4, "steps": 2}
    settings |= {"mntp": True, "mntp_steps": 2, "mntp_batch_size": 8, "micro_batch_size": 2, "eval_images": 2}
    models_take_at_most(tokens=7 * WORDS)
    line = last_line(capsys, "train-teacher", "--data", long_csv(24), *flags(settings))
    assert "; give a smaller --mntp-batch-size, --gradient-checkpointing or" in line


def test_build_bank_takes_smaller_batches_by_itself(
    finished_teacher: Path,
    long_csv: Any,
    tmp_path: Path,
    short_of_memory: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = long_csv(500 if ON_GPU else 24)
    words = ["build-bank", "--data", data, *flags({"teacher": finished_teacher, "precision": "fp32"})]
    command(*words, "--out", tmp_path / "usual")
    short_of_memory(128, tokens=4 * (WORDS + 2))  # half a million tokens take half a GiB
    capsys.readouterr()
    command(*words, "--out", tmp_path / "halved", "--batch-tokens", 1_000_000)
    told = capsys.readouterr().err
    assert told.count("it is encoded in halves; a --batch-tokens below 1,000,000 saves the vain attempts") == 1
    usual, halved = (Bank.open(tmp_path / name) for name in ("usual", "halved"))
    rows = np.arange(usual.num_rows)
    assert cosines(*(one.vectors(rows).astype(np.float32) for one in (usual, halved))).min() > 0.999999


def test_a_caption_that_does_not_fit(
    finished_teacher: Path,
    images_csv: Path,
    tmp_path: Path,
    models_take_at_most: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models_take_at_most(tokens=4)
    words = flags({"teacher": finished_teacher, "precision": "fp32", "out": tmp_path / "bank"})
    assert cli.run(["build-bank", "--data", str(images_csv), *words]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "one caption of " in line and "; give --precision bf16, --device cpu, or a teacher of a smaller" in line


@gpu_only("a model that does not fit into a CPU's memory is ended by the system")
def test_a_teacher_that_does_not_fit(
    finished_teacher: Path,
    images_csv: Path,
    tmp_path: Path,
    short_of_memory: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is no model that cannot be loaded: the line must not say so."""
    short_of_memory(0)
    ballast: list[Tensor] = []
    with pytest.raises(torch.OutOfMemoryError):  # what is free in blocks that are in use
        while True:
            ballast.append(torch.empty(512, dtype=torch.uint8, device="cuda"))
    words = ["--data", images_csv, "--teacher", finished_teacher, "--out", tmp_path / "bank"]
    line = last_line(capsys, "build-bank", *words, "--precision", "fp32")
    assert "; give a small --batch-tokens or --precision bf16 or --device cpu" in line and "loaded" not in line
    command("build-bank", *words, "--precision", "fp32", "--device", "cpu")


def test_evaluate(
    finished_student: Path,
    finished_teacher: Path,
    images_csv: Path,
    tmp_path: Path,
    models_take_at_most: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models_take_at_most(images=4)
    words = ["evaluate", "--model", finished_student, "--data", images_csv, "--teacher", finished_teacher]
    words += ["--out", tmp_path / "report", "--precision", "bf16"]
    line = last_line(capsys, *words, "--batch-size", 8)
    assert "; give a smaller --batch-size (now 8) or --device cpu" in line
    command(*words, "--batch-size", 4)
