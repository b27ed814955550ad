"""Images per second of a whole training step, beside the tower's bare forward and backward, and open_clip's step.

Ours is all that `train-student` does: JPEGs of 512 x 384 read from tars and cropped, vectors of 4,096 numbers gathered
from a bank, the tower, the adaptor (273 M parameters on a GPU), the loss, clipping, AdamW, the log. The bare tower sees
one ready batch on the device and has neither loss nor optimizer. open_clip's step is its model of the same tower with
its own text tower, its ClipLoss and AdamW, also on a ready batch. Same batch, precision and checkpointing for all; the
parts stay in memory and take turns, step by step, and the median of the rounds counts. On a CPU seconds are those of
processor time, the loader's included, which other programs on the machine do not stretch. On a GPU they are those of
the clock; the loader reads ahead while the others have their turn, so whether it keeps up is for
`python -m benchmarks loader` to say.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import loader
from benchmarks.device import clock_mhz, product_rate, rounds, share_of, wait
from benchmarks.rows import not_measured, spread
from llm2clip.errors import LLM2CLIPError
from llm2clip.student.accelerator import start_accelerator
from llm2clip.student.config import StudentConfig
from llm2clip.student.muon import Muon
from llm2clip.student.session import Session
from llm2clip.student.train import train_step

DISTINCT_IMAGES, PER_TAR = 32, 4096
GPU_WORKERS = max(1, min(14, len(os.sched_getaffinity(0)) - 2))


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
    workers: int
    bare_batch: int | None = None
    """Images of a step of the bare tower, if not `batch`: its rate needs no more."""
    warm_up: bool = True
    """Whether a step of each is taken before the first round."""
    peer: str = ""
    """Why there is no step of open_clip's, if there is none."""
    product: int = 8192
    """Side of the matrices whose product is the limit; on a CPU not measured."""


LARGE = {"layers": 24, "width": 1024, "heads": 16, "patch": 14, "image_size": 336, "precision": "bf16"}
LARGE |= {"teacher_dim": 4096, "dim": 1280, "workers": GPU_WORKERS}
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
    workers=0,
)
TINY = Setting(
    name="2 layers of 64, batch 8 in micro-batches of 4, fp32",
    layers=2,
    width=64,
    heads=2,
    patch=16,
    image_size=64,
    batch=8,
    micro_batch=4,
    precision="fp32",
    checkpointing=False,
    teacher_dim=64,
    dim=32,
    rounds=2,
    workers=0,
)
SETTINGS = {
    "tiny": TINY,
    "cpu": CPU,
    "512": Setting(
        name="ViT-L/14-336, batch 512, bf16", **LARGE, batch=512, micro_batch=512, checkpointing=True, rounds=5
    ),
    "4096": Setting(
        name="ViT-L/14-336, batch 4,096 in micro-batches of 64, bf16",
        **LARGE,
        batch=4096,
        micro_batch=64,
        checkpointing=False,
        rounds=2,
        bare_batch=1024,
        warm_up=False,
        peer="its step has no micro-batches outside its training script; see batch 512",
    ),
}
GPU_SIZES = ("512", "4096")


def write_tower(folder: Path, setting: Setting, device: str) -> Path:
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
    with torch.device(device):
        CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def ours(setting: Setting, folder: Path) -> Iterator[int]:
    """Whole training steps; before them, once, 0: the first batch is here."""
    config = StudentConfig(
        bank=(str(folder / "bank"),),
        tower=str(folder / "tower"),
        out=folder / f"student-{setting.batch}",
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
        if session.step == 0:
            yield 0
        session.journal.add(session.step + 1, train_step(session, batches))
        session.step += 1
        yield setting.batch


def bare(setting: Setting, folder: Path, device: str) -> Iterator[int]:
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
    batch = setting.bare_batch or setting.batch
    yield 0
    while True:
        for _ in range(batch // setting.micro_batch):
            with autocast(setting, device):
                pooled = tower(pixels).pooler_output
            pooled.float().square().mean().backward()
        tower.zero_grad()
        yield batch


def open_clips(setting: Setting, device: str) -> Iterator[int]:
    """open_clip's step: both towers, its loss, AdamW."""
    import open_clip

    vision = {"image_size": setting.image_size, "layers": setting.layers, "width": setting.width}
    vision |= {"head_width": setting.width // setting.heads, "patch_size": setting.patch}
    text_width = 768 if setting.width >= 1024 else 384
    text = {"context_length": 77, "vocab_size": 49408, "width": text_width, "heads": text_width // 64, "layers": 12}
    with torch.device(device):
        model = open_clip.CLIP(embed_dim=text_width, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    model.to(device).train()
    model.set_grad_checkpointing(setting.checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    loss_fn = open_clip.ClipLoss()
    pixels = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, device=device)
    tokens = torch.randint(1, 49000, (setting.batch, 77), device=device)
    yield 0
    while True:
        optimizer.zero_grad()
        with autocast(setting, device):
            image, text_features, scale = model(pixels, tokens)
            loss = loss_fn(image, text_features, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        yield setting.batch


def autocast(setting: Setting, device: str) -> Any:
    """bf16 arithmetic where the setting says so."""
    return nullcontext() if setting.precision == "fp32" else torch.autocast(device.split(":")[0], torch.bfloat16)


class Part:
    """One of those that take turns: its steps, their seconds an image, and the GPU memory it had at most."""

    def __init__(self, make: Callable[[], Iterator[int]], device: str) -> None:
        self.device, self.seconds, self.failure, self.gib = device, [], "", 0.0
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        self.own_bytes = 0
        self.steps = make()

    def step(self, *, record: bool = True) -> None:
        """Take one step; a part that the memory is too small for takes no more."""
        if self.failure:
            return
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - self.own_bytes
        start = self.clock()
        try:
            images = next(self.steps)
            wait(self.device)
        except (torch.OutOfMemoryError, LLM2CLIPError) as error:
            self.failure = str(error).splitlines()[0][:200]
        if self.failure:  # not in the except block, whose exception holds on to the memory
            self.steps = iter(())
            gc.collect()
            torch.cuda.empty_cache()
            return
        if record:
            self.seconds.append((self.clock() - start) / images)
        if self.device != "cpu":
            self.own_bytes = torch.cuda.memory_allocated() - others
            self.gib = max(self.gib, (torch.cuda.max_memory_allocated() - others) / 2**30)


def take_turns(parts: dict[str, Part], setting: Setting, device: str, until: float | None) -> list[float]:
    """Let the parts take steps; returns the rates of a matrix product in between, on a GPU."""
    limits = []
    for _ in rounds(setting.rounds, until):
        for part in parts.values():
            part.step()
        if device != "cpu":
            limits.append(product_rate(device, setting.precision, size=setting.product))
    return limits


def compare(setting: Setting, folder: Path, device: str, until: float | None) -> Iterator[dict]:
    """Rows of one setting."""
    makers: dict[str, Callable[[], Iterator[int]]] = {
        "bare tower": lambda: bare(setting, folder, device),
        "ours": lambda: ours(setting, folder),
        "open_clip": lambda: open_clips(setting, device),
    }
    reason = setting.peer or ("" if importlib.util.find_spec("open_clip") else "open_clip is not installed")
    if reason:
        del makers["open_clip"]
        yield not_measured(f"{setting.name}: open_clip", reason)
    parts = {}
    for name, make in makers.items():  # one after the other: what a part adds to the memory is its own
        parts[name] = Part(make, device)
        for _ in range(2 if setting.warm_up else 1):  # the first makes it
            parts[name].step(record=False)
    limits = take_turns(parts, setting, device, until)
    for name, part in parts.items():
        if part.failure:
            yield not_measured(f"{setting.name}: {name}", part.failure)
    times = {name: part.seconds for name, part in parts.items() if not part.failure}
    clock = clock_mhz(device)
    for name in times:
        yield rate_row(setting, name, times, against="bare tower", clock=clock)
    if "ours" in times and "open_clip" in times:
        yield rate_row(setting, "ours", times, against="open_clip", clock=clock)
    if limits and "ours" in times:
        yield arithmetic(setting, times["ours"], limits, clock=clock)
    if device != "cpu":
        yield from (memory_row(setting, name, parts) for name in times)


def rate_row(setting: Setting, name: str, times: dict[str, list[float]], *, against: str, clock: int | None) -> dict:
    """The rate of a part, and the median of the ratios of its rounds to those of another."""
    row = {
        "name": f"{setting.name}: {name}",
        "value": 1 / statistics.median(times[name]),
        "unit": "images/s",
        "against": against,
        "clock_mhz": clock,
    }
    if against in times:
        ratios = [b / a for a, b in zip(times[name], times[against], strict=False)]
        row |= {"ratio": statistics.median(ratios), "spread": None if name == against else spread(ratios)}
    return row


def arithmetic(setting: Setting, seconds: list[float], limits: list[float], *, clock: int | None) -> dict:
    """What share of the device's matrix product rate our step's useful arithmetic is (MFU, by what was measured).

    FLOP of an image: forward and backward are three forwards, each of layers x (24 N W^2 + 4 N^2 W), for N tokens of
    width W; what is computed twice counts once, the adaptor and the loss not at all.
    """
    tokens = (setting.image_size // setting.patch) ** 2 + 1
    forward = setting.layers * (24 * tokens * setting.width**2 + 4 * tokens**2 * setting.width)
    limit = statistics.median(limits)
    shares = [3 * forward / one / limit for one in seconds]
    size = f"{setting.product:,} x {setting.product:,}"
    return {
        "name": f"{setting.name}: MFU, 3 x layers x (24 N W^2 + 4 N^2 W) = {3 * forward / 1e9:,.0f} GFLOP an image",
        "value": 3 * forward / statistics.median(seconds) / 1e12,
        "unit": "TFLOP/s",
        "ratio": statistics.median(shares),
        "against": f"{limit / 1e12:.0f} TFLOP/s of a {setting.precision} product of {size}",
        "spread": spread(shares),
        "clock_mhz": clock,
    }


def memory_row(setting: Setting, name: str, parts: dict[str, Part]) -> dict:
    """Peak memory on the GPU of a part alone."""
    least = parts["bare tower"].gib
    return {
        "name": f"{setting.name}: memory of {name}",
        "value": parts[name].gib,
        "unit": "GiB",
        "ratio": parts[name].gib / least if least else None,
        "against": "the bare tower",
    }


def muon_row(setting: Setting, device: str) -> dict:
    """Muon's step of the six matrices of one block, beside that of PyTorch's own, which computes in bf16 everywhere."""
    width, times = setting.width, {}
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    for kind in (Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        part = Part(partial(_steps, kind(weights, lr=1e-3)), device)
        for number in range(4):
            part.step(record=number > 0)
        times[kind] = statistics.median(part.seconds)
    return {
        "name": f"Muon's step of one block {width:,} wide",
        "value": 1e3 * times[Muon],
        "unit": "ms",
        "ratio": times[Muon] / times[torch.optim.Muon],
        "against": f"torch.optim.Muon, {1e3 * times[torch.optim.Muon]:,.4g} ms",
    }


def _steps(optimizer: torch.optim.Optimizer) -> Iterator[int]:
    while True:
        optimizer.step()
        yield 1


def run(settings: list[Setting], device: str, until: float | None = None) -> Iterator[dict]:
    """Rows for `python -m benchmarks step`; the settings share images, bank and tower."""
    logging.getLogger("llm2clip").setLevel(logging.WARNING)
    first, most = settings[0], max(setting.batch for setting in settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tower(folder / "tower", first, device)
        images = max(2 * most, 256)
        tars = loader.write_tars(folder, images=images, distinct=DISTINCT_IMAGES, per_tar=PER_TAR)
        loader.write_test_bank(folder / "bank", tars, dim=first.teacher_dim)
        for left, setting in zip(range(len(settings), 0, -1), settings, strict=True):
            yield from compare(setting, folder, device, share_of(until, left))
            gc.collect()
            torch.cuda.empty_cache()
    yield muon_row(first, device)
