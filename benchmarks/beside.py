"""Steps of two trainings at once on one machine, whose threads spin where they wait, or sleep.

OpenMP's threads wait by spinning for a while unless OMP_WAIT_POLICY is PASSIVE, and so take the cores from another
program's. Each training is the forward and backward of the demo's tower in a process of its own, with as many threads
as torch takes; all start at a word, and the two policies take turns.
`python -m benchmarks.beside SIZE` is such a process: it says that it is ready and, when told, takes its steps.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import step
from benchmarks.device import rounds
from benchmarks.rows import not_measured, spread

POLICIES = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}
"""Of threads that wait: as torch comes, and what a user can set."""
OURS = {"name": "the demo's tower, batch 128, fp32", "layers": 4, "width": 128, "heads": 4, "batch": 128}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained, and for how long."""

    setting: step.Setting
    seconds: float
    rounds: int


SETTINGS = {
    "tiny": Size(setting=step.TINY, seconds=0.5, rounds=1),
    "cpu": Size(setting=dataclasses.replace(step.TINY, **OURS, micro_batch=128), seconds=20.0, rounds=3),
}
GPU_SIZES = ()


def run(sizes: Sequence[Size], device: str, until: float | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the steps a second of each training, alone and of two at once."""
    if device != "cpu":
        yield not_measured("trainings at once", "threads of a CPU are what is measured; leave --device out")
        return
    for name, size in SETTINGS.items():
        if size not in sizes:
            continue
        measured = [
            {(policy, at_once): rate(name, policy, at_once) for policy in POLICIES for at_once in (1, 2)}
            for _ in rounds(size.rounds, until)
        ]
        for at_once, who in ((1, "alone"), (2, "each of two at once")):
            ratios = [one["sleeping", at_once] / one["spinning", at_once] for one in measured]
            for policy in POLICIES:
                row = {
                    "name": f"{size.setting.name}: {who}, threads {policy}",
                    "value": statistics.median(one[policy, at_once] for one in measured),
                    "unit": "steps/s",
                }
                if policy == "sleeping":
                    row |= {"ratio": statistics.median(ratios), "against": "spinning", "spread": spread(ratios)}
                yield row


def rate(name: str, policy: str, at_once: int) -> float:
    """The mean steps a second of so many trainings at once."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | POLICIES[policy]
    command = [sys.executable, "-m", "benchmarks.beside", name]
    started = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(at_once)
    ]
    for one in started:
        one.stdout.readline()  # ready
    for one in started:
        one.stdin.write("go\n")
        one.stdin.flush()
    return statistics.mean(float(one.communicate()[0]) for one in started)


def train(size: Size) -> None:
    """Take steps for as long as the size says, and print how many there were a second."""
    with tempfile.TemporaryDirectory() as name:
        step.write_tower(Path(name) / "tower", size.setting, "cpu")
        steps = step.bare(size.setting, Path(name), "cpu")
        for _ in range(3):
            next(steps)
        print("ready", flush=True)
        sys.stdin.readline()
        began, done = time.monotonic(), 0
        while time.monotonic() - began < size.seconds:
            next(steps)
            done += 1
        print(done / (time.monotonic() - began))


if __name__ == "__main__":
    train(SETTINGS[sys.argv[1]])
