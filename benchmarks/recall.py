"""recall@1, 5, 10 both ways of 5,000 images and 25,000 captions, beside the least that any exact route must do.

That least is one product of all vectors and the ten best of every row and of every column. CLIP_benchmark's metric is
measured too where it is installed (`pip install --no-deps clip_benchmark`). Each measurement has a process of its own,
as the highest memory of a process never falls again; routes take turns, and medians are reported.
`python -m benchmarks.recall ROUTE DEVICE` makes one measurement and prints it as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.device import rounds, share_of

NUM_IMAGES, CAPTIONS_EACH, DIM = 5_000, 5, 1_280
KS = (1, 5, 10)
ROUNDS = 3
LEAST, PEER = "one product and two top-10s", "CLIP_benchmark 1.6"


def run(device: str, until: float | None = None) -> Iterator[dict]:
    """Rows of time and extra memory, ours against the least and against the peer."""
    others = [LEAST, *([PEER] if importlib.util.find_spec("clip_benchmark") else [])]
    measured = [
        {route: measure(route, device) for route in ("ours", LEAST)} for _ in rounds(ROUNDS, share_of(until, 2))
    ]

    def median(route: str, key: str) -> float:
        return statistics.median(one[route][key] for one in measured if route in one)

    for route in others:
        if route == PEER:  # slow, and nobody's bar: once
            measured[0][PEER] = measure(PEER, device)
        for key, scale, unit in (("seconds", 1, "s"), ("extra_bytes", 2**30, "GiB")):
            value, other = median("ours", key) / scale, median(route, key) / scale
            name = f"recall@1,5,10 both ways: {'time' if unit == 's' else 'extra memory'}"
            yield row(name, value, unit, value / other, f"{route}, {other:.2f} {unit}")
    if PEER in others:
        ours, theirs = (np.array(measured[0][route]["recall"]) for route in ("ours", PEER))
        yield row("largest difference of a score", float(np.abs(ours - theirs).max()), "", None, PEER)
    cra = measure("caption retrieval", device)
    yield row("caption retrieval among 25,000: time", cra["seconds"], "s")
    yield row("caption retrieval among 25,000: extra memory", cra["extra_bytes"] / 2**30, "GiB")


def row(name: str, value: float, unit: str, ratio: float | None = None, against: str = "") -> dict:
    """A row of the table."""
    return {"name": name, "value": value, "unit": unit, "ratio": ratio, "against": against}


def measure(route: str, device: str) -> dict:
    """One route in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.recall", route, device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_here(route: str, device: str) -> dict:
    """Seconds, bytes beyond the vectors, and the scores."""
    function = routes()[route]
    function(*vectors(64, device))  # starts threads and libraries
    given = vectors(NUM_IMAGES, device)
    before = memory(device, reset=True)
    start = time.perf_counter()
    scores = function(*given)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "extra_bytes": memory(device) - before, "recall": scores}


def vectors(num_images: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images and of captions somewhat like them, and the captions' image numbers, shuffled."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(num_images, DIM, generator=generator))
    owner = torch.arange(num_images).repeat_interleave(CAPTIONS_EACH)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    text = torch.randn(len(owner), DIM, generator=generator).mul_(0.3).add_(image[owner])
    return image.to(device), torch.nn.functional.normalize(text).to(device), owner


def routes() -> dict[str, Callable[[Tensor, Tensor, Tensor], list[float]]]:
    """The routes by name: functions of images, captions and the captions' image numbers."""
    return {"ours": ours, LEAST: least, PEER: peer, "caption retrieval": caption_retrieval}


def ours(image: Tensor, text: Tensor, owner: Tensor) -> list[float]:
    """The package's metric."""
    from llm2clip.metrics import recall_both_ways

    to_text, to_image = recall_both_ways(image, text, range(len(image)), owner, KS)
    return [score[k] for score in (to_text, to_image) for k in KS]


def least(image: Tensor, text: Tensor, owner: Tensor) -> list[float]:
    """What any exact route must at least do."""
    scores = image @ text.T
    best = scores.topk(max(KS), dim=1).indices, scores.T.topk(max(KS), dim=1).indices
    return [float(one.sum()) for one in best]


def peer(image: Tensor, text: Tensor, owner: Tensor) -> list[float]:
    """CLIP_benchmark's metric, as its `evaluate` calls it: batches of 64, for each k and way."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = text @ image.T
    pairs = torch.zeros_like(scores, dtype=torch.bool)
    pairs[torch.arange(len(text)), owner] = True
    ways = ((scores.T, pairs.T), (scores, pairs))
    hits = [batchify(recall_at_k, *way, 64, image.device, k=k) for way in ways for k in KS]
    return [float((hit > 0).float().mean()) for hit in hits]


def caption_retrieval(image: Tensor, text: Tensor, owner: Tensor) -> list[float]:
    """Caption retrieval accuracy among all captions."""
    from llm2clip.metrics import caption_retrieval_accuracy

    return [caption_retrieval_accuracy(text, owner)]


def memory(device: str, *, reset: bool = False) -> int:
    """Bytes in use if `reset`, from which the highest counts from here on; else the highest so far."""
    if device != "cpu":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the kernel's own mark of the highest memory
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], sys.argv[2])))
