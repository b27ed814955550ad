"""The contrastive loss beside open_clip's: time of forward and backward, and the memory it needs beyond its inputs.

On a CPU each measurement has a process of its own, as the highest memory of a process never falls again; on a GPU all
have one. Ours and theirs take turns, and medians are reported. `python -m benchmarks.loss VARIANT NUM_PAIRS DEVICE`
makes one measurement and prints it as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.device import clock_mhz, product_rate, rounds, share_of
from benchmarks.rows import not_measured, spread

DIM = 1280
NUM_PAIRS, MOST_PAIRS = 16_384, 65_536
ROUNDS = 3
PAIRS_OF_VARIANTS = (("softmax", "open_clip.ClipLoss"), ("sigmoid", "open_clip.SigLipLoss"))
PAIRS_A_PROCESS = 4096
WARM_UP_PAIRS = 4096


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How many pairs, and what is measured on them."""

    pairs: int
    rounds: int
    compared: tuple[tuple[str, str], ...] = PAIRS_OF_VARIANTS
    """Ours and theirs; "" for none."""
    own_processes: bool = False
    product: int = 8192
    """Side of the fp32 matrices whose product is the limit."""


SETTINGS = {
    "tiny": Setting(pairs=256, rounds=2, product=256),
    "cpu": Setting(pairs=NUM_PAIRS, rounds=ROUNDS, own_processes=True),
    "16384": Setting(pairs=16_384, rounds=5),
    "262144": Setting(pairs=262_144, rounds=2, compared=(("softmax", ""),)),
}
GPU_SIZES = ("16384", "262144")


def run(settings: list[Setting], device: str, until: float | None = None) -> Iterator[dict]:
    """Rows of time, memory and agreement; on a CPU also of 65,536 pairs, and of gathering beside a ring."""
    for left, setting in zip(range(len(settings), 0, -1), settings, strict=True):
        if setting.own_processes:
            yield from in_own_processes(setting, device, share_of(until, left))
        else:
            yield from in_turns(setting, device, share_of(until, left))


def in_own_processes(setting: Setting, device: str, until: float | None) -> Iterator[dict]:
    """Rows at 16,384 x 1,280, of agreement, and if there is time enough at 65,536 and of gathering beside a ring."""
    first = None
    number = len(setting.compared) + 2
    for left, (ours, theirs) in zip(range(number, 0, -1), setting.compared, strict=False):
        measured = [
            {name: measure(name, setting.pairs, device) for name in present(ours, theirs)}
            for _ in rounds(setting.rounds, share_of(until, left))
        ]
        rows = list(compare(ours, theirs, measured))
        first = first or rows[0]
        yield from rows
    name = "softmax, equal captions left out"
    with_rows = [measure(name, setting.pairs, device) for _ in rounds(setting.rounds, share_of(until, 2))]
    seconds = statistics.median(one["seconds"] for one in with_rows)
    yield row("softmax, equal captions left out: time", seconds, "s", seconds / first["value"], "softmax")
    yield from compare_with_ring(until)
    if until is not None:
        yield not_measured(f"softmax at {MOST_PAIRS:,}", "takes minutes: give --full")
        return
    largest = measure("softmax", MOST_PAIRS, device)
    yield row(f"softmax at {MOST_PAIRS:,}: time", largest["seconds"], "s")
    yield row(f"softmax at {MOST_PAIRS:,}: extra memory", largest["extra_bytes"] / 2**30, "GiB")


def in_turns(setting: Setting, device: str, until: float | None) -> Iterator[dict]:
    """Rows measured in this process, with the share of the rate of a matrix product that is our loss's arithmetic."""
    for left, (ours, theirs) in zip(range(len(setting.compared), 0, -1), setting.compared, strict=True):
        names = present(ours, theirs)
        for name in names:
            measure_once(name, min(WARM_UP_PAIRS, setting.pairs), device)
        measured, limits = [], []
        for _ in rounds(setting.rounds, share_of(until, left)):
            measured.append({name: measure_once(name, setting.pairs, device) for name in names})
            limits.append(product_rate(device, "fp32", size=setting.product))
        about = {"clock_mhz": clock_mhz(device)}
        start = f"{setting.pairs:,} pairs, "
        for one in compare(ours, theirs, measured, with_memory=device != "cpu"):
            yield one | about | {"name": start + one["name"]}
        yield arithmetic(f"{start}{ours}", setting, [one[ours]["seconds"] for one in measured], limits) | about


def present(ours: str, theirs: str) -> list[str]:
    """The variants that can be measured here."""
    return [ours, theirs] if theirs and importlib.util.find_spec("open_clip") else [ours]


def arithmetic(name: str, setting: Setting, seconds: list[float], limits: list[float]) -> dict:
    """The least FLOP of a loss (three products: scores, and the derivatives by images and captions) in its time."""
    flop, limit = 6 * setting.pairs**2 * DIM, statistics.median(limits)
    shares = [flop / one / limit for one in seconds]
    product = f"{limit / 1e12:.3g} TFLOP/s of a fp32 product of {setting.product:,} x {setting.product:,}"
    rate = flop / statistics.median(seconds) / 1e12
    title = f"{name}: 6 x pairs^2 x {DIM:,} FLOP"
    return row(title, rate, "TFLOP/s", statistics.median(shares), product) | {"spread": spread(shares)}


def compare(ours: str, theirs: str, measured: list[dict[str, dict]], *, with_memory: bool = True) -> Iterator[dict]:
    """Rows on one loss: time, memory, and how far loss and gradients are from the peer's."""
    has_peer = theirs in measured[0]
    if theirs and not has_peer:
        yield not_measured(theirs, "open_clip is not installed")
    figures = [("seconds", "time", "s", 1), ("extra_bytes", "extra memory", "GiB", 2**30)]
    for key, name, unit, size in figures if with_memory else figures[:1]:
        own = [one[ours][key] / size for one in measured]
        if not has_peer:
            yield row(f"{ours}: {name}", statistics.median(own), unit) | {"spread": spread(own)}
            continue
        peer = [one[theirs][key] / size for one in measured]
        ratio = statistics.median(own) / statistics.median(peer)
        ratios = [a / b for a, b in zip(own, peer, strict=True) if b]
        against = f"{theirs}, {statistics.median(peer):.3g} {unit}"
        yield row(f"{ours}: {name}", statistics.median(own), unit, ratio, against) | {"spread": spread(ratios)}
    if has_peer:
        mine, peer = measured[0][ours], measured[0][theirs]
        apart = max(abs(mine[key] - peer[key]) / abs(peer[key]) for key in ("loss", "image", "text", "scale"))
        yield row(f"{ours}: largest relative difference", apart, "", None, f"{theirs}: loss and gradients")


def row(name: str, value: float, unit: str, ratio: float | None = None, against: str = "") -> dict:
    """A row of the table."""
    return {"name": name, "value": value, "unit": unit, "ratio": ratio, "against": against}


def measure(variant: str, num_pairs: int, device: str) -> dict:
    """One forward and backward in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss", variant, str(num_pairs), device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_here(variant: str, num_pairs: int, device: str) -> dict:
    """One measurement by a process of its own."""
    measure_once(variant, 64, device)  # starts threads and libraries
    return measure_once(variant, num_pairs, device)


def measure_once(variant: str, num_pairs: int, device: str) -> dict:
    """Seconds, bytes beyond the inputs, and numbers that tell whether two variants agree."""
    loss_fn = losses()[variant]
    image, text, scale = inputs(num_pairs, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = memory(device)  # waits for it, too
    start = time.perf_counter()
    loss = loss_fn(image, text, scale)
    loss.backward()
    numbers = {"loss": loss.item(), "scale": scale.grad.item()}  # waits for the device
    seconds = time.perf_counter() - start
    extra = memory(device, highest=True) - before
    probe = torch.linspace(-1, 1, DIM, device=device)
    numbers |= {name: (x.grad @ probe).norm().item() for name, x in (("image", image), ("text", text))}
    return {"seconds": seconds, "extra_bytes": extra, **numbers}


def inputs(num_pairs: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images and of captions that are somewhat like them, and CLIP's first scale."""
    generator = torch.Generator(device).manual_seed(0)

    def unit_vectors() -> Tensor:
        drawn = torch.randn(num_pairs, DIM, generator=generator, device=device)
        return torch.nn.functional.normalize(drawn)

    image, noise = unit_vectors(), unit_vectors()
    text = torch.nn.functional.normalize(image.add(noise, alpha=3))
    leaves = (image, text, torch.tensor(1 / 0.07, device=device))
    return tuple(leaf.requires_grad_() for leaf in leaves)  # type: ignore[return-value]


def losses() -> dict[str, Callable[..., Tensor]]:
    """The variants by name, those of open_clip where it is installed: functions of images, captions and scale."""
    from llm2clip.student.loss import contrastive_loss

    bias = torch.tensor(-10.0)
    variants: dict[str, Callable[..., Tensor]] = {
        "softmax": contrastive_loss,
        "softmax, equal captions left out": lambda image, text, scale: contrastive_loss(
            image, text, scale, rows=torch.arange(len(image), device=image.device)
        ),
        "sigmoid": lambda image, text, scale: contrastive_loss(
            image, text, scale, bias=bias.to(image.device), kind="sigmoid"
        ),
    }
    if importlib.util.find_spec("open_clip"):
        import open_clip.loss

        clip, siglip = open_clip.loss.ClipLoss(), open_clip.loss.SigLipLoss()
        variants["open_clip.ClipLoss"] = clip
        variants["open_clip.SigLipLoss"] = lambda image, text, scale: siglip(image, text, scale, bias.to(image.device))
    return variants


def memory(device: str, *, highest: bool = False) -> int:
    """Bytes in use now, or the most there ever were, by this process or on the device."""
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if highest else torch.cuda.memory_allocated()
    if highest:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compare_with_ring(until: float | None) -> list[dict]:
    """Gathered captions (what we do) beside a ring, on two processes of this machine."""
    measured = [{name: measure_ring(name) for name in ("gathered", "ring")} for _ in rounds(ROUNDS, until)]
    rows = []
    for key, name, unit, size in (("seconds", "time", "s", 1), ("extra_bytes", "extra memory", "GiB", 2**30)):
        ours, ring = (
            statistics.median(one[variant][key] for one in measured) / size for variant in ("gathered", "ring")
        )
        title = f"softmax, gathered, 2 processes x {PAIRS_A_PROCESS:,}: {name}"
        rows.append(row(title, ours, unit, ours / ring, f"passed around in a ring, {ring:.3g} {unit}"))
    return rows


def measure_ring(variant: str) -> dict:
    """One forward and backward on two fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.ring", variant, str(PAIRS_A_PROCESS), f"{folder}/meet"]
        processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE) for rank in range(2)]
        outputs = [process.communicate()[0] for process in processes]
    return json.loads(outputs[0])


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
