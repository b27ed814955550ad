"""What so many images bring: `python table.py OUT [--images 100 300 1000 3000] [--seeds 3]` runs run.sh for each.

Prints R@1 with 95 % intervals (Wilson's, over the test images of all seeds) of the student and of the mini CLIP that
its tower is of, and processor minutes, which other work on the machine does not stretch. What is done is kept, so a
killed run goes on (its minutes are then those of its last part).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean

from llm2clip.scores import interval

HERE = Path(__file__).resolve().parent
COLUMNS = [f"test/{kind}/{way}_r@1" for kind in ("short", "long") for way in ("i2t", "t2i")]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    write("| images | short: image to text | text to image | long: image to text | text to image | processor minutes |")
    write("|---|---|---|---|---|---|")
    for images in asked.images:
        runs = [run(asked.out / f"{images}-{seed}", images, seed) for seed in range(asked.seeds)]
        write(row(f"{images:,}", [one["metrics"] for one, _ in runs], f"{mean(took for _, took in runs) / 60:.0f}"))
    write(row("mini CLIP", [one["baseline"]["metrics"] for one, _ in runs], ""))


def run(folder: Path, images: int, seed: int) -> tuple[dict, float]:
    """The report of one run of the five commands, and its processor seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "seconds"
    if not told.exists():
        start = _spent()
        with (folder / "log.txt").open("a") as log:
            words = ["bash", str(HERE / "run.sh"), str(folder), str(images), str(seed)]
            subprocess.run(words, check=True, stdout=log, stderr=log, env={**os.environ, "PYTHON": sys.executable})
        told.write_text(str(_spent() - start))
    return json.loads((folder / "scores" / "report.json").read_text()), float(told.read_text())


def _spent() -> float:
    """Processor seconds of all that was run so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def row(name: str, runs: list[dict[str, float]], minutes: str) -> str:
    """Percent, and the interval of all seeds' images together."""
    cells = []
    for column in COLUMNS:
        share = mean(metrics[column] for metrics in runs)
        low, high = interval(share, 100 * len(runs))
        cells.append(f"{100 * share:.0f} ({100 * low:.0f} to {100 * high:.0f})")
    return f"| {name} | {' | '.join(cells)} | {minutes} |"


if __name__ == "__main__":
    main()
