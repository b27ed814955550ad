"""The contrastive loss beside open_clip's: time of forward and backward, and the memory it needs beyond its inputs.

Each measurement has a process of its own, as the highest memory of a process never falls again; ours and theirs take
turns, and medians are reported. `python -m benchmarks.loss VARIANT NUM_PAIRS DEVICE` makes one and prints it as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

DIM = 1280
NUM_PAIRS, MOST_PAIRS = 16_384, 65_536
ROUNDS = 3
PAIRS_OF_VARIANTS = (("softmax", "open_clip.ClipLoss"), ("sigmoid", "open_clip.SigLipLoss"))
PAIRS_A_PROCESS = 4096


def run(device: str) -> list[dict]:
    """Rows of time and memory at 16,384 x 1,280 and 65,536 x 1,280, of agreement, and of gathering beside a ring."""
    rows = []
    for ours, theirs in PAIRS_OF_VARIANTS:
        rounds = [(measure(ours, NUM_PAIRS, device), measure(theirs, NUM_PAIRS, device)) for _ in range(ROUNDS)]
        rows += compare(ours, theirs, rounds)
    with_rows = [measure("softmax, equal captions left out", NUM_PAIRS, device) for _ in range(ROUNDS)]
    seconds = statistics.median(one["seconds"] for one in with_rows)
    ratio = seconds / rows[0]["value"]
    rows.append(row("softmax, equal captions left out: time", seconds, "s", ratio, "softmax"))
    largest = measure("softmax", MOST_PAIRS, device)
    rows.append(row(f"softmax at {MOST_PAIRS:,}: time", largest["seconds"], "s"))
    rows.append(row(f"softmax at {MOST_PAIRS:,}: extra memory", largest["extra_bytes"] / 2**30, "GiB"))
    return rows + (compare_with_ring() if device == "cpu" else [])


def compare(ours: str, theirs: str, rounds: list[tuple[dict, dict]]) -> list[dict]:
    """Rows on one loss: time, memory, and how far loss and gradients are from the peer's."""

    def median(key: str, place: int) -> float:
        return statistics.median(pair[place][key] for pair in rounds)

    mine, peer = rounds[0]
    time_ratio = median("seconds", 0) / median("seconds", 1)
    memory_ratio = median("extra_bytes", 0) / median("extra_bytes", 1)
    peer_gib = f"{median('extra_bytes', 1) / 2**30:.2f} GiB"
    apart = max(abs(mine[key] - peer[key]) / abs(peer[key]) for key in ("loss", "image", "text", "scale"))
    return [
        row(f"{ours}: time", median("seconds", 0), "s", time_ratio, f"{theirs}, {median('seconds', 1):.2f} s"),
        row(f"{ours}: extra memory", median("extra_bytes", 0) / 2**30, "GiB", memory_ratio, f"{theirs}, {peer_gib}"),
        row(f"{ours}: largest relative difference", apart, "", None, f"{theirs}: loss and gradients"),
    ]


def row(name: str, value: float, unit: str, ratio: float | None = None, against: str = "") -> dict:
    """A row of the table."""
    return {"name": name, "value": value, "unit": unit, "ratio": ratio, "against": against}


def measure(variant: str, num_pairs: int, device: str) -> dict:
    """One forward and backward in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss", variant, str(num_pairs), device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_here(variant: str, num_pairs: int, device: str) -> dict:
    """Seconds, bytes beyond the inputs, and numbers that tell whether two variants agree."""
    loss_fn = losses()[variant]
    image, text, scale = inputs(64, device)
    loss_fn(image, text, scale).backward()  # starts threads and libraries
    for _ in range(1 if device == "cpu" else 3):  # a device needs more to get going
        image, text, scale = inputs(num_pairs, device)
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
    """Unit vectors of pictures and of captions that are somewhat like them, and CLIP's first scale."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(num_pairs, DIM, generator=generator))
    noise = torch.nn.functional.normalize(torch.randn(num_pairs, DIM, generator=generator))
    text = torch.nn.functional.normalize(image.add(noise, alpha=3))
    leaves = (image, text, torch.tensor(1 / 0.07))
    return tuple(leaf.to(device).requires_grad_() for leaf in leaves)  # type: ignore[return-value]


def losses() -> dict[str, Callable[..., Tensor]]:
    """The variants by name: functions of pictures, captions and scale."""
    import open_clip.loss

    from llm2clip.student.loss import contrastive_loss

    bias = torch.tensor(-10.0)
    clip, siglip = open_clip.loss.ClipLoss(), open_clip.loss.SigLipLoss()
    return {
        "softmax": contrastive_loss,
        "softmax, equal captions left out": lambda image, text, scale: contrastive_loss(
            image, text, scale, rows=torch.arange(len(image), device=image.device)
        ),
        "sigmoid": lambda image, text, scale: contrastive_loss(
            image, text, scale, bias=bias.to(image.device), kind="sigmoid"
        ),
        "open_clip.ClipLoss": clip,
        "open_clip.SigLipLoss": lambda image, text, scale: siglip(image, text, scale, bias.to(image.device)),
    }


def memory(device: str, *, highest: bool = False) -> int:
    """Bytes in use now, or the most there ever were, by this process or on the device."""
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if highest else torch.cuda.memory_allocated()
    if highest:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compare_with_ring() -> list[dict]:
    """Gathered captions (what we do) beside a ring, on two processes of this machine."""
    rounds = {variant: [measure_ring(variant) for _ in range(ROUNDS)] for variant in ("gathered", "ring")}
    rows = []
    for key, name, unit, size in (("seconds", "time", "s", 1), ("extra_bytes", "extra memory", "GiB", 2**30)):
        ours, ring = (statistics.median(one[key] for one in rounds[variant]) / size for variant in rounds)
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
