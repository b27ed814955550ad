"""Pictures per second of a whole training step, beside the tower's bare forward and backward, and open_clip's step.

Ours is all that `train-student` does: JPEGs of 512 x 384 read from tars and cropped, vectors of 4,096 numbers gathered
from a bank, the tower, the adaptor (273 M parameters on a GPU), the loss, clipping, AdamW, the log. The bare tower sees
one ready batch on the device and has neither loss nor optimizer. open_clip's step is its model of the same tower with
its own text tower, its ClipLoss and AdamW, also on a ready batch. Same batch, precision and checkpointing for all; the
parts take turns, on a CPU step by step, and the median of the rounds counts. On a CPU seconds are those of processor
time, the loader's included, which other programs on the machine do not stretch.
"""

from __future__ import annotations

import gc
import io
import itertools
import logging
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import loader
from llm2clip.student.accelerator import start_accelerator
from llm2clip.student.config import StudentConfig
from llm2clip.student.session import Session
from llm2clip.student.train import train_step

DISTINCT_PICTURES, PER_TAR = 256, 4096


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One comparison: a tower and how it is trained."""

    name: str
    layers: int
    width: int
    heads: int
    patch: int
    image_size: int
    batch: int
    micro_batch: int
    precision: str
    checkpointing: bool
    teacher_dim: int
    dim: int
    rounds: int
    steps: int
    """Steps of a round; on a CPU one."""
    workers: int
    peer: bool = True


CPU = Setting(
    name="ViT-S/16-224, batch 32, fp32",
    layers=12,
    width=384,
    heads=6,
    patch=16,
    image_size=224,
    batch=32,
    micro_batch=32,
    precision="fp32",
    checkpointing=False,
    teacher_dim=512,
    dim=512,
    rounds=9,
    steps=1,
    workers=0,
)
LARGE = {"layers": 24, "width": 1024, "heads": 16, "patch": 14, "image_size": 336, "precision": "bf16"}
LARGE |= {"teacher_dim": 4096, "dim": 1280}
GPU = (
    Setting(
        name="ViT-L/14-336, batch 512, bf16",
        **LARGE,
        batch=512,
        micro_batch=512,
        checkpointing=True,
        rounds=3,
        steps=5,
        workers=14,
    ),
    Setting(
        name="ViT-L/14-336, batch 16,384 in micro-batches of 128, bf16",
        **LARGE,
        batch=16_384,
        micro_batch=128,
        checkpointing=False,
        rounds=1,
        steps=1,
        workers=14,
        peer=False,
    ),
)


def write_tower(folder: Path, setting: Setting) -> Path:
    """A CLIP vision tower of random weights with its image processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    size = setting.image_size
    config = CLIPVisionConfig(
        hidden_size=setting.width,
        intermediate_size=4 * setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        image_size=size,
        patch_size=setting.patch,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Tars of `count` pictures, of which 256 are distinct."""
    rng, jpegs, paths = np.random.default_rng(0), [], []
    for _ in range(min(count, DISTINCT_PICTURES)):
        buffer = io.BytesIO()
        loader.photograph(rng).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    for first in range(0, count, PER_TAR):
        paths.append(folder / f"{first // PER_TAR:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for key in range(first, min(first + PER_TAR, count)):
                for name, data in ((f"{key:09d}.jpg", jpegs[key % len(jpegs)]), (f"{key:09d}.txt", b"%d" % key)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return paths


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ours(setting: Setting, folder: Path) -> Iterator[None]:
    """Whole training steps."""
    config = StudentConfig(
        bank=(str(folder / "bank"),),
        tower=str(folder / "tower"),
        out=folder / "student",
        steps=10_000,
        batch_size=setting.batch,
        micro_batch_size=setting.micro_batch,
        dim=setting.dim,
        precision=setting.precision,
        gradient_checkpointing=setting.checkpointing,
        workers=setting.workers,
        tracker="none",
    )
    config.out.mkdir(exist_ok=True)
    session = Session(config, start_accelerator(config))
    for batches in session.batches():
        session.begin_step()
        session.journal.add(session.step + 1, train_step(session, batches))
        session.step += 1
        yield


def bare(setting: Setting, folder: Path, device: str) -> Iterator[None]:
    """The tower's forward and backward on a ready batch, in the same micro-batches.

    A batch of several micro-batches cannot keep all activations: the bare tower computes them twice, too.
    """
    from transformers import CLIPVisionModel

    from llm2clip.student.tower import checkpoint_activations

    tower = CLIPVisionModel.from_pretrained(folder / "tower").to(device).train()
    if setting.checkpointing or setting.micro_batch < setting.batch:
        checkpoint_activations(tower)
    size = setting.image_size
    pixels = torch.randn(setting.micro_batch, 3, size, size, device=device)
    while True:
        for _ in range(setting.batch // setting.micro_batch):
            with autocast(setting, device):
                pooled = tower(pixels).pooler_output
            pooled.float().square().mean().backward()
        tower.zero_grad()
        yield


def open_clips(setting: Setting, device: str) -> Iterator[None]:
    """open_clip's step: both towers, its loss, AdamW."""
    import open_clip

    vision = {"image_size": setting.image_size, "layers": setting.layers, "width": setting.width}
    vision |= {"head_width": setting.width // setting.heads, "patch_size": setting.patch}
    text_width = 768 if setting.width >= 1024 else 384
    text = {"context_length": 77, "vocab_size": 49408, "width": text_width, "heads": text_width // 64, "layers": 12}
    model = open_clip.CLIP(embed_dim=text_width, vision_cfg=vision, text_cfg=text, quick_gelu=True).to(device).train()
    model.set_grad_checkpointing(setting.checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    loss_fn = open_clip.ClipLoss()
    pixels = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, device=device)
    tokens = torch.randint(1, 49000, (setting.batch, 77), device=device)
    while True:
        optimizer.zero_grad()
        with autocast(setting, device):
            image, text_features, scale = model(pixels, tokens)
            loss = loss_fn(image, text_features, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        yield


def autocast(setting: Setting, device: str) -> Any:
    """bf16 arithmetic where the setting says so."""
    return nullcontext() if setting.precision == "fp32" else torch.autocast(device.split(":")[0], torch.bfloat16)


@contextmanager
def peak_memory(device: str, found: dict[str, float], name: str) -> Iterator[None]:
    """Note the GiB that the block had on the GPU at most."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    yield
    if device.startswith("cuda"):
        found[name] = torch.cuda.max_memory_allocated() / 2**30


def seconds_a_step(make: Callable[[], Iterator[None]], setting: Setting, device: str) -> list[float]:
    """Seconds a step in each round, after a warm-up; what was made is let go of afterwards, and its memory."""
    steps, times = make(), []
    for _ in itertools.islice(steps, 2 if setting.steps > 1 else 1):
        wait(device)
    for _ in range(setting.rounds):
        start = time.perf_counter()
        for _ in itertools.islice(steps, setting.steps):
            pass
        wait(device)
        times.append((time.perf_counter() - start) / setting.steps)
    steps.close()
    gc.collect()
    torch.cuda.empty_cache()
    return times


def seconds_step_by_step(parts: dict[str, Callable[[], Iterator[None]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time a step, on a CPU: all parts stay in memory and take single steps in turns."""
    running = {part: make() for part, make in parts.items()}
    times: dict[str, list[float]] = {part: [] for part in parts}
    for number in range(rounds + 1):
        for part, steps in running.items():
            start = time.process_time()
            next(steps)
            if number:  # the first warms up
                times[part].append(time.process_time() - start)
    return times


def compare(setting: Setting, device: str) -> list[dict]:
    """Rows of one setting."""
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tower(folder / "tower", setting)
        with mock.patch.object(loader, "TEACHER_DIM", setting.teacher_dim):
            tars = write_pictures(folder, max(2 * setting.batch, DISTINCT_PICTURES))
            loader.write_test_bank(folder / "bank", tars)
        parts = {
            "bare tower": lambda: bare(setting, folder, device),
            "ours": lambda: ours(setting, folder),
            **({"open_clip": lambda: open_clips(setting, device)} if setting.peer else {}),
        }
        if device == "cpu":
            times = seconds_step_by_step(parts, setting.rounds)
        else:
            times = {part: [] for part in parts}
            for _ in range(2 if setting.rounds > 1 else 1):  # in turns: a machine's speed drifts
                for part, make in parts.items():
                    with peak_memory(device, memory, part):
                        times[part] += seconds_a_step(make, setting, device)
    rates = {part: setting.batch / statistics.median(values) for part, values in times.items()}
    rows = [rate_row(setting, part, rates[part], times, against="bare tower") for part in parts]
    if setting.peer:
        rows.append(rate_row(setting, "ours", rates["ours"], times, against="open_clip"))
    if device.startswith("cuda"):
        rows += [*limits(setting, rates), *memory_rows(setting, memory)]
    return rows


def rate_row(setting: Setting, part: str, rate: float, times: dict[str, list[float]], *, against: str) -> dict:
    """The rate of a part, and the median of the ratios of its rounds to those of another."""
    ratios = sorted(b / a for a, b in zip(times[part], times[against], strict=True))
    spread = "" if part == against or len(ratios) < 4 else f", {ratios[0]:.2f} to {ratios[-1]:.2f}"
    return {
        "name": f"{setting.name}: {part}",
        "value": rate,
        "unit": "pictures/s",
        "ratio": statistics.median(ratios),
        "against": f"{against}{spread}",
    }


def limits(setting: Setting, rates: dict[str, float]) -> list[dict]:
    """What share of the device's matrix product rate our step's useful arithmetic is."""
    tokens = (setting.image_size // setting.patch) ** 2 + 1
    forward = setting.layers * (24 * tokens * setting.width**2 + 4 * tokens**2 * setting.width)  # FLOP a picture
    achieved = 3 * forward * rates["ours"]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    limit = 10 * 2 * 8192**3 / (time.perf_counter() - start)
    return [
        {
            "name": f"{setting.name}: tower forward and backward, without what is computed twice",
            "value": achieved / 1e12,
            "unit": "TFLOP/s",
            "ratio": achieved / limit,
            "against": f"a bf16 product of 8192 x 8192 matrices, {limit / 1e12:.0f} TFLOP/s",
        }
    ]


def memory_rows(setting: Setting, memory: dict[str, float]) -> list[dict]:
    """Peak memory on the GPU."""
    return [
        {
            "name": f"{setting.name}: memory of {part}",
            "value": value,
            "unit": "GiB",
            "ratio": value / memory["bare tower"],
            "against": "the bare tower",
        }
        for part, value in memory.items()
    ]


def run(device: str) -> list[dict]:
    """Rows for `python -m benchmarks step`."""
    logging.getLogger("llm2clip").setLevel(logging.WARNING)
    settings = GPU if device.startswith("cuda") else (CPU,)
    return [row for setting in settings for row in compare(setting, device)]
