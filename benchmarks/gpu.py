"""`scripts/gpu`: the tests and benchmarks that need a GPU, within a few minutes, into one table.

It needs no network and no environment of its own, only the Python that holds torch. The table and the figures as JSON
grow in `--out` while it runs, so that a run that is cut short leaves what it measured. Exit code: 0, also with parts
that are not measured; 1 if tests or a benchmark failed or ran over; 2 without a device, or for wrong use.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import glob
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import course, wheels
from benchmarks.course import Part, Record
from benchmarks.rows import line

ROOT = Path(__file__).resolve().parent.parent
PREPARATION, RESERVE = 12.0, 3.0
"""Seconds for wheels and a look at the device, and those kept for the end."""
BASE = ("torch", "transformers", "sentence_transformers", "accelerate", "peft", "pyarrow", "datasets", "tyro")
OTHER_WAYS = "--dry-run lists what would run; --device cpu --minutes 3 runs all of it at tiny sizes"


def plan(device: str, minutes: float) -> list[Part]:
    """The parts in their order, the cheapest and most wanted first.

    Budgets are for five minutes on an H100 (for three on a CPU of two cores): reckoned with 400 TFLOP/s of useful bf16
    arithmetic, 50 of fp32, 10 s to start a process and make its data. More minutes stretch all of them.
    """
    parts = on_cpu() if device == "cpu" else on_gpu()
    stretch = max(1.0, (60 * minutes - PREPARATION - RESERVE) / sum(part.budget for part in parts))
    return [dataclasses.replace(part, budget=stretch * part.budget) for part in parts]


def on_gpu() -> list[Part]:
    """At the sizes that matter."""
    step = "ViT-L/14-336, 1.5 TFLOP an image: 512 x 3 parts 6 s a round, 4,096 + 1,024 20 s"
    return [
        tests(57, "pytest -m gpu, every verb on tiny models"),
        benchmark(
            "loss", "16384", 18, "16,384 pairs, 3 TFLOP of fp32: 0.1 s each of ours and open_clip's, both losses"
        ),
        benchmark("encode", "1B", 38, "0.9 M tokens x 1.9 GFLOP: 4 s a round, the bare LLM and a peer 8 s"),
        benchmark("step", "512 4096", 82, step),
        benchmark("loader", "gpu", 18, "three pipelines on a core, then ours on all: 5 s"),
        benchmark("encode", "8B", 36, "0.25 M tokens x 14 GFLOP: 9 s a round, the bare LLM 10 s"),
        benchmark("loss", "262144", 36, "262,144 pairs, 700 TFLOP of fp32 at 35 TFLOP/s in tiles: 20 s"),
    ]


def on_cpu() -> list[Part]:
    """At tiny sizes: to try the course, not to measure."""
    return [
        tests(50, "pytest -m gpu on the CPU, those of training"),
        benchmark("loss", "tiny", 20, "256 pairs", device="cpu"),
        benchmark("encode", "tiny", 30, "a Llama of one layer", device="cpu"),
        benchmark("step", "tiny", 35, "a tower of two layers, batch 8", device="cpu"),
        benchmark("loader", "tiny", 25, "64 images", device="cpu"),
    ]


def tests(budget: float, about: str) -> Part:
    """The tests as a part."""
    command = (sys.executable, "-m", "benchmarks.tests")
    return Part(name="tests", command=command, budget=budget, about=about, needs=("pytest", *BASE))


def benchmark(name: str, sizes: str, budget: float, about: str, *, device: str = "cuda") -> Part:
    """A benchmark at one of its sizes, or several, as a part."""
    command = (sys.executable, "-m", "benchmarks", name, "--device", device, "--size", *sizes.split())
    needs = ("torch",) if name == "loss" else BASE
    return Part(name=f"{name} {sizes}", command=command, budget=budget, about=about, needs=needs)


def main() -> int:
    """Do what the command line asks for; returns the exit code."""
    start = time.monotonic()
    asked = parse()
    try:
        if asked.fetch_wheels:
            print(wheels.fetch(asked.fetch_wheels))
            return 0
        if asked.dry_run:
            print(plan_as_text(plan(asked.device, asked.minutes), asked.minutes))
            return 0
        return measure(asked, deadline=start + 60 * asked.minutes - RESERVE)
    except wheels.WheelsError as error:
        print(f"scripts/gpu: {error}", file=sys.stderr)
        return 2


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="never longer than this, all included (default 5)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="use packages from here that are not installed")
    parser.add_argument("--fetch-wheels", type=Path, metavar="DIR", help="on another machine: collect them, no more")
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and for how long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: all of it at tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the table (default out/gpu)")
    asked = parser.parse_args()
    if not 0 < asked.minutes <= 24 * 60:
        parser.error(f"--minutes is {asked.minutes:g}; it must be above 0 and at most 1440")
    return asked


def measure(asked: argparse.Namespace, *, deadline: float) -> int:
    """Run the course; returns the exit code."""
    if asked.device == "cuda" and not may_have_gpu():
        return refuse(asked.device, "this machine has no driver for one")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as site:
        environment = environment_for(asked.device, site)
        facts: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "minutes": asked.minutes}
        if asked.wheels:
            facts["wheels"] = wheels.install(asked.wheels, Path(site), seconds=deadline - time.monotonic())
            importlib.invalidate_caches()
            sys.path.insert(0, site)
        found = look_at(asked.device, environment, seconds=deadline - time.monotonic())
        if "error" in found:
            return refuse(asked.device, found["error"])
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / course.LOG).unlink(missing_ok=True)
        record = Record(asked.out, found | facts)
        print(json.dumps(record.facts), flush=True)
        return follow(plan(asked.device, asked.minutes), record, deadline=deadline, environment=environment)


def follow(parts: list[Part], record: Record, *, deadline: float, environment: dict[str, str]) -> int:
    """Run the parts, printing the rows of each as it ends; returns the exit code."""
    record.plan(parts)
    for name in course.run(parts, record, deadline=deadline, cwd=ROOT, environment=environment):
        if name.startswith("loader"):
            compare_loader_with_step(record, name)
        part = record.parts[name]
        print(f"\n{name}: {part['state']} {part['reason']}", *map(line, part["rows"]), sep="\n", flush=True)
    print(f"\n{record.folder / course.TABLE}")
    return int(any(part["state"] in ("failed", "over budget") for part in record.parts.values()))


def compare_loader_with_step(record: Record, name: str) -> None:
    """Add what the loader's workers bring as a multiple of what a training step of this run takes."""
    brings = [row for row in record.parts[name]["rows"] if row["name"].endswith("workers")]
    steps = [row for part, found in record.parts.items() if part.startswith("step") for row in found["rows"]]
    takes = [row for row in steps if row["name"].endswith(": ours") and row["value"]]
    if brings and takes:
        ratio = brings[0]["value"] / takes[0]["value"]
        against = f"what a step takes, {takes[0]['value']:.4g} {takes[0]['unit']} ({takes[0]['name']})"
        record.add(name, {**brings[0], "ratio": ratio, "against": against, "spread": None})


def may_have_gpu() -> bool:
    """Whether anything here hints at a GPU, without the seconds that torch takes to say so."""
    if shutil.which("nvidia-smi") or any(map(glob.glob, ("/dev/nvidia*", "/dev/dxg", "/dev/kfd"))):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def refuse(device: str, reason: str) -> int:
    """One line on standard error; returns the exit code."""
    what = f"no CUDA device ({reason}); {OTHER_WAYS}" if device == "cuda" else reason
    print(f"scripts/gpu: {what}", file=sys.stderr)
    return 2


def look_at(device: str, environment: dict[str, str], *, seconds: float) -> dict[str, Any]:
    """The facts of the device, by a process of its own: a driver may hang."""
    command = [sys.executable, "-m", "benchmarks.device", device]
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"torch gave no answer within {seconds:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return {"error": f"{sys.executable}: {last}; LLM2CLIP_PYTHON names the Python that has torch"}
    return json.loads(done.stdout.splitlines()[-1])


def environment_for(device: str, site: str) -> dict[str, str]:
    """What the parts find in their environment."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), site, *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        fixed |= {"CUDA_VISIBLE_DEVICES": "", "LLM2CLIP_TEST_DEVICE": "cpu"}
    else:
        fixed |= {"LLM2CLIP_TEST_DEVICE": "cuda"}
        fixed["LLM2CLIP_TEST_GPUS"] = os.environ.get("LLM2CLIP_TEST_GPUS") or os.environ.get(
            "CUDA_VISIBLE_DEVICES", "0"
        )
    return {**os.environ, **fixed}


def stop(number: int, frame: object) -> None:
    """End by a signal: what is at work is killed on the way out."""
    del frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(128 + number)


def plan_as_text(parts: list[Part], minutes: float) -> str:
    """The parts with their budgets, and which of them the minutes do not hold."""
    total, left = 60 * minutes, 60 * minutes - PREPARATION - RESERVE
    lines = [f"{PREPARATION:4.0f} s  look at the device, use wheels"]
    for part in parts:
        missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
        notes = [f"not installed: {', '.join(missing)}"] if missing else []
        fits = part.budget <= left + 0.5
        notes += [] if fits else ["only if those before it end sooner"]
        left -= part.budget if fits else 0
        lines.append(f"{part.budget:4.0f} s  {part.name}: {part.about}{''.join(f' ({note})' for note in notes)}")
    lines.append(f"{RESERVE:4.0f} s  kept for the end")
    return "\n".join([*lines, f"{total - max(left, 0):4.0f} s of {total:.0f}"])


if __name__ == "__main__":
    sys.exit(main())
