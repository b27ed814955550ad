"""What the student's options are worth in the miniature: `python -m benchmarks.options DEMO [--split val]`.

DEMO is the folder of a finished `llm2clip demo --seeds N`. Each option trains arm D's student anew from the same
teacher, images, steps and seed with one setting changed, and is scored on fresh test images, or on validation ones
with `--split val`. The table gives the mean over seeds and the gap to the plain run, seed by seed, with its standard
deviation; DEMO/options/SPLIT.json has every figure. What is done is kept, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from demo import arms
from demo.config import BUDGETS
from demo.run import SHIPPED
from demo.write import TEST_KINDS, columns, write_csv
from llm2clip.artifacts import is_complete, write_json

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two captions as positives": {"captions_per_image": 2},
    "joined with CLIP's own text vector": {"bank": "joined"},
    "vectors stored as int8": {"bank": "int8"},
}
IMAGES = 500
METRICS = [f"captions/{kind}/{way}_r@1" for kind in TEST_KINDS for way in ("i2t", "t2i")]


def main() -> None:
    """Train, score and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--share", choices=("all", "tenth"), default="all", help="of the pairs")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    seeds = sorted(int(path.name.removeprefix("seed-")) for path in asked.demo.glob("seed-*"))
    pool = ProcessPoolExecutor(
        asked.processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        list(pool.map(prepare, *zip(*[(asked.demo, seed, asked.split, asked.share) for seed in seeds], strict=True)))
        tasks = [(asked.demo, seed, asked.split, asked.share, name) for name in OPTIONS for seed in seeds]
        scores = list(pool.map(measure, *zip(*tasks, strict=True)))
    found: dict[str, list[list[float]]] = {name: [] for name in OPTIONS}
    for task, one in zip(tasks, scores, strict=True):
        found[task[-1]].append(one)
    write_json(asked.demo / "options" / f"{asked.split}-{asked.share}.json", {"seeds": seeds, "scores": found})
    print(table(found))


def prepare(demo: Path, seed: int, split: str, share: str) -> None:
    """The images that are scored, the joined teacher, its bank and one of int8 vectors."""
    from llm2clip.teacher.config import JoinConfig
    from llm2clip.teacher.join import join_teachers

    folder, out = demo / f"seed-{seed}", demo / "options" / f"seed-{seed}"
    if split != "test" and not (out / split / "captions.csv").exists():
        write_csv(out / split, split, IMAGES, seed=seed)
    teacher = folder / "teachers" / f"joined-{share}"
    join_teachers(JoinConfig(teachers=(str(folder / "teachers" / f"lora-{share}"), str(SHIPPED / "clip")), out=teacher))
    arms.make_bank(folder, teacher=teacher.name, share=share, out=f"joined-{share}")
    arms.make_bank(folder, teacher=f"lora-{share}", share=share, out=f"int8-{share}", dtype="int8")


def measure(demo: Path, seed: int, split: str, share: str, option: str) -> list[float]:
    """R@1 by column of one student."""
    from llm2clip.eval.config import EvaluateConfig
    from llm2clip.eval.run import evaluate
    from llm2clip.student.train import train_student

    folder = demo / f"seed-{seed}"
    out = demo / "options" / f"seed-{seed}" / f"{option.replace(' ', '-').replace(chr(39), '')}-{share}"
    changes = dict(OPTIONS[option])
    bank = changes.pop("bank", "D")
    config = arms.student_config(
        folder / "banks" / f"{bank}-{share}", folder / "tower", out / "model", BUDGETS["small"], seed=seed, share=share
    )
    train_student(dataclasses.replace(config, **changes))
    scored = folder / "data" / "test" if split == "test" else demo / "options" / f"seed-{seed}" / split
    if not is_complete(out / split):
        evaluate(
            EvaluateConfig(
                data=(str(scored / "captions.csv"),),
                captions=columns(),
                out=out / split,
                model=str(out / "model"),
                teacher=str(folder / "teachers" / f"{'joined' if bank == 'joined' else 'lora'}-{share}"),
                precision="fp32",
            )
        )
    metrics = json.loads((out / split / "report.json").read_text())["metrics"]
    return [metrics[name] for name in METRICS]


def table(found: dict[str, list[list[float]]]) -> str:
    """Percent by kind (both ways together), mean over seeds, and the gap of their mean to the plain run."""
    kinds = [*TEST_KINDS, "mean"]
    lines = [f"| option | {' | '.join(kinds)} | gap of the mean |", "|---|" + "---|" * (len(kinds) + 1)]
    plain = [mean(one) for one in found["plain"]]
    for name, runs in found.items():
        cells = [f"{100 * mean(v for one in runs for v in one[2 * i : 2 * i + 2]):.1f}" for i in range(len(TEST_KINDS))]
        gaps = [100 * (mean(one) - base) for one, base in zip(runs, plain, strict=True)]
        spread = f" ± {stdev(gaps):.1f}" if len(gaps) > 1 else ""
        gap = "" if name == "plain" else f"{mean(gaps):+.1f}{spread}"
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * mean(map(mean, runs)):.1f} | {gap} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
