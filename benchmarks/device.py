"""The device a benchmark runs on: what it is, its clock, and the rate of one large matrix product, the limit of all.

`python -m benchmarks.device cuda` prints what there is as JSON; `{"error": ...}` where there is no such device.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "peft", "timm", "datasets", "pyarrow")
PEERS = ("open_clip_torch", "webdataset", "flash-attn", "bitsandbytes")
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
SMI_SECONDS = 5
CUT: list[str] = []
"""Of the rounds taken last, how many of how many, where time was short."""
PRODUCTS = 5


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that `work` takes."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def rounds(most: int, until: float | None) -> Iterator[int]:
    """0, 1, ... below `most`; fewer where another round would end after `until`, but at least one.

    Each is told of on stderr as it begins; `CUT` says of the last ones how many there were.

    Args:
        most: how many the figures that are quoted rest on.
        until: on the clock of `time.monotonic`; None for all rounds.
    """
    longest = 0.0
    CUT.clear()
    for number in range(most):
        start = time.monotonic()
        if number and until is not None and start + longest > until:
            CUT.append(f"{number} of {most} rounds")
            return
        left = f", about {(most - number) * longest:.0f} s to go" if longest else ""
        print(f"round {number + 1} of {most}{left}", file=sys.stderr, flush=True)
        yield number
        longest = max(longest, time.monotonic() - start)


def share_of(until: float | None, number: int) -> float | None:
    """When the first of `number` things that share the time until `until` should be done."""
    return None if until is None else time.monotonic() + (until - time.monotonic()) / number


def product_rate(device: str, precision: str = "bf16", *, size: int = 8192) -> float:
    """FLOP/s of a product of two `size` x `size` matrices of random numbers: the median of a few."""
    import torch

    from llm2clip.hub import DTYPES

    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(PRODUCTS))


def clock_mhz(device: str) -> int | None:
    """The clock of the GPU's processors now; None on a CPU, and where nvidia-smi is missing."""
    found = smi("clocks.sm") if device.startswith("cuda") else []
    return int(found[0]) if found and found[0].isdigit() else None


def smi(*fields: str) -> list[str]:
    """What nvidia-smi says of the first visible GPU; nothing where it says nothing."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", "-i", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return [value.strip() for value in done.stdout.strip().split(",")]


def facts(device: str) -> dict[str, Any]:
    """What figures are measured on."""
    import torch

    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return {"error": f"torch {torch.__version__}, {built}, sees none"}
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            **dict(zip(SMI_FIELDS, smi(*SMI_FIELDS), strict=False)),
        }
    return found | {name: version for name in (*PACKAGES, *PEERS) if (version := version_of(name))}


def version_of(package: str) -> str | None:
    """The installed version of a package, if there is one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name as Linux gives it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.processor()


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])))
