"""The laboratory: `python -m demo.lab OUT --arms control inherit --seeds 3` tells what arms of stage 2 are worth.

Each arm is arm D's student trained anew with some settings changed: the same images, teacher, steps and seed. It is
scored on retrieval by kind of caption (short ones the mini CLIP knew, the others it gains) and on zero-shot
classification of scenes of one thing (what it knew). Arms are chosen on validation scenes, the default;
`--split test` opens the test scenes. OUT may be the folder of a finished `llm2clip demo`, whose teachers and banks
then serve. What is done is kept: a killed run goes on, another arm is one more row. `--set captions_per_image=2`
changes a setting of every arm asked for. OUT/lab-SPLIT-SHARE.md has the table, the .json beside it every figure.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from demo import arms
from demo.classes import SETS
from demo.config import BUDGETS, Budget
from demo.jobs import Job, run_jobs
from demo.results import CLASSES, COLUMNS, scores_of
from demo.run import SHIPPED
from demo.write import TEST_KINDS, captioned
from llm2clip.artifacts import atomic_path, is_complete, read_json, write_json
from llm2clip.errors import LLM2CLIPError, UsageError

LLM, CLIP = SHIPPED / "llm", SHIPPED / "clip"
BUDGET = dataclasses.replace(BUDGETS["small"], steps=160, steps_tenth=80)
CONTROL, PRETRAINED = "control", "mini CLIP as pretrained"
CHOSEN = "inherit, whole tower, keep"
"""On validation scenes, of the arms that inherit from captions without images (docs/lab-notes.md)."""
VIEWS = {"long": "rest,sample"}
"""What a bank with views has beside the captions themselves."""
TEXT_SEED = 1000
"""Seeds of scenes that only their captions are taken of begin here."""
NOTHING = 1e-12
"""A learning rate that changes nothing."""


@dataclass(frozen=True)
class Arm:
    """A student.

    Attributes:
        settings: of train-student, where they differ from arm D's.
        texts: whether it inherits from captions without images, too.
        teacher: lora; lora-texts, which has read those captions in stage 1; or joined: lora's and the CLIP's text half.
        dtype: of the bank.
        views: whether the bank has views of the long captions, too.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    texts: bool = False
    teacher: str = "lora"
    dtype: str = "float16"
    views: bool = False

    def banks(self) -> list[tuple[str, str, str]]:
        """Teacher, dtype and content of each bank it needs: "" or "views", and "texts", of captions without images."""
        contents = ["views" if self.views else "", *(["texts"] if self.texts else [])]
        return [(self.teacher, self.dtype, content) for content in contents]


INHERIT: dict[str, Any] = {
    "inherit": "auto",
    "inherit_kinds": ("short",),
    "dim": None,
    "mix": {"short": 0.3, "long": 0.7},
    "optimizer": "adamw",
    "unlocked_blocks": 0,
    "adaptor_learning_rate": 2e-3,
    "adaptor_warmup_steps": 0,
    "warmup_steps": 0,
}
VIEWED = {"short": 0.3, "long": 0.3, "long-rest": 0.2, "long-sample": 0.2}
"""The mix of `INHERIT`, the long captions' share divided among them and their views."""
WHOLE = {**INHERIT, "unlocked_blocks": None, "learning_rate": 5e-4, "keep": 0.0}
BLIND = {**INHERIT, "steps": 1, "adaptor_learning_rate": NOTHING, "learning_rate": NOTHING}
ARMS: dict[str, Arm] = {
    CONTROL: Arm(),
    "control, texts in stage 1": Arm(teacher="lora-texts"),
    "control, two captions": Arm({"captions_per_image": 2}),
    "control, int8 bank": Arm(dtype="int8"),
    "control, joined teacher": Arm(teacher="joined"),
    "text only": Arm(BLIND, texts=True),
    "inherit own": Arm(INHERIT),
    "inherit": Arm(INHERIT, texts=True),
    "inherit, no keep-text": Arm({**INHERIT, "keep_text": 0.0}, texts=True),
    "inherit, no noise": Arm({**INHERIT, "inherit_noise": 0.0}, texts=True),
    "inherit, mostly short": Arm({**INHERIT, "mix": arms.MIX}, texts=True),
    "inherit own, whole tower, keep": Arm({**WHOLE, "keep": 1.0}),
    "inherit, whole tower": Arm(WHOLE, texts=True),
    CHOSEN: Arm({**WHOLE, "keep": 1.0}, texts=True),
    f"{CHOSEN}, views": Arm({**WHOLE, "keep": 1.0, "mix": VIEWED}, texts=True, views=True),
}


def main() -> None:
    """Train, score and print the table."""
    parser = argparse.ArgumentParser(prog="python -m demo.lab", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=[CONTROL, CHOSEN], metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--share", choices=("all", "tenth"), default="all", help="of the pairs")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="a setting of every arm (JSON)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="too little of everything to mean anything")
    asked = parser.parse_args()
    wanted = {name: ARMS[name] for name in asked.arms}
    if asked.set:
        try:
            read = {name: json.loads(value) for name, _, value in (change.partition("=") for change in asked.set)}
        except ValueError:
            parser.error(f"--set {' '.join(asked.set)}: write NAME=VALUE, the value as JSON: captions_per_image=2")
        wanted = {
            f"{name}, {', '.join(asked.set)}": dataclasses.replace(arm, settings={**arm.settings, **read})
            for name, arm in wanted.items()
        }
    lab = Lab(asked.out, asked.split, asked.share, BUDGETS["quick"] if asked.quick else BUDGET)
    try:
        lab.run(wanted, range(asked.seeds), processes=asked.processes)
    except LLM2CLIPError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(lab.write_table(range(asked.seeds)))


@dataclass(frozen=True)
class Lab:
    """Where arms are measured, on what, and how long they train."""

    out: Path
    split: str
    share: str
    budget: Budget

    def folder(self, seed: int) -> Path:
        """Of a seed: as the demo's."""
        return self.out / f"seed-{seed}"

    def result(self, arm: str, seed: int) -> Path:
        """The file of what an arm got."""
        return self.folder(seed) / "lab" / f"{arm}, {self.share}" / f"{self.split}.json"

    def run(self, wanted: Mapping[str, Arm], seeds: Sequence[int], *, processes: int) -> None:
        """Make what is missing.

        Raises:
            UsageError: if what is there was made with other amounts of everything.
        """
        budget, amounts = self.out / "lab.json", dataclasses.asdict(self.budget)
        if budget.exists() and read_json(budget) != amounts:
            raise UsageError(f"{self.out} was begun with or without --quick, unlike this; name a new folder")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(budget, amounts)
        for seed in seeds:
            (self.folder(seed) / "lab").mkdir(parents=True, exist_ok=True)
        jobs = [job for seed in seeds for job in self.jobs(wanted, seed)]
        run_jobs(jobs, processes=processes, log=self.out / "lab.log")

    def jobs(self, wanted: Mapping[str, Arm], seed: int) -> list[Job]:
        """Of one seed, those whose result is missing; each after those it needs."""
        made: dict[str, Any] = {"lab": self, "seed": seed}
        missing = {name: arm for name, arm in wanted.items() if not self.result(name, seed).exists()}
        jobs = [Job(f"{seed} data", make_data, made, cost=30)]
        teachers = {arm.teacher for arm in missing.values()}
        for teacher in teachers | ({"lora"} if "joined" in teachers else set()):
            before = f"{seed} lora" if teacher == "joined" else f"{seed} data"
            jobs.append(Job(f"{seed} {teacher}", make_teacher, {**made, "teacher": teacher}, (before,), 110))
        jobs.sort(key=lambda job: job.name.endswith("joined"))
        for bank in {bank for arm in missing.values() for bank in arm.banks()}:
            settings: dict[str, Any] = dict(zip(("teacher", "dtype", "content"), bank, strict=True))
            jobs.append(Job(f"{seed} bank {bank}", make_bank, {**made, **settings}, (f"{seed} {bank[0]}",), 30))
        for name, arm in missing.items():
            needs = tuple(f"{seed} bank {bank}" for bank in arm.banks())
            jobs.append(Job(f"{seed} {name}", measure, {**made, "name": name, "arm": arm}, needs, 120))
        if not self.result(PRETRAINED, seed).exists():
            settings = {**made, "name": PRETRAINED, "arm": None}
            jobs.append(Job(f"{seed} {PRETRAINED}", measure, settings, (f"{seed} data",), 10))
        return jobs

    def bank(self, seed: int, teacher: str, dtype: str, content: str) -> Path:
        """The folder of a bank: of the training captions, with their views or not, or of those without images."""
        if (teacher, dtype, content) == ("lora", "float16", ""):
            return self.folder(seed) / "banks" / f"D-{self.share}"  # the demo's own
        return self.folder(seed) / "banks" / "-".join(filter(None, (teacher, dtype, content, self.share)))

    def teacher(self, seed: int, name: str) -> Path:
        """The folder of a teacher."""
        return self.folder(seed) / "teachers" / f"{name}-{self.share}"

    def texts(self, seed: int) -> Path:
        """Captions of scenes that no image is drawn of."""
        return self.folder(seed) / "data" / "texts.csv"

    def write_table(self, seeds: Sequence[int]) -> str:
        """All arms that every seed has finished, in the order they came; returns the table and writes it."""
        found: dict[str, list[dict[str, Any]]] = {}
        first = self.folder(seeds[0]) / "lab"
        for path in sorted(first.glob(f"*, {self.share}/{self.split}.json"), key=lambda path: path.stat().st_mtime):
            name = path.parent.name.removesuffix(f", {self.share}")
            if all(self.result(name, seed).exists() for seed in seeds):
                found[name] = [read_json(self.result(name, seed)) for seed in seeds]
        text = table(found)
        path = self.out / f"lab-{self.split}-{self.share}"
        write_json(path.with_suffix(".json"), {"seeds": list(seeds), "arms": found})
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        return text


def make_data(lab: Lab, seed: int) -> None:
    """Training tars, test images, those of the split that is scored, scenes of one thing, captions without images."""
    folder = lab.folder(seed) / "data"
    if not (folder / "test" / "captions.csv").exists():
        arms.make_data(folder.parent, lab.budget, seed)
    if not (folder / f"{lab.split}-classes").exists():
        arms.make_scored(folder.parent, lab.budget, seed, split=lab.split)
    if not lab.texts(seed).exists():
        with atomic_path(lab.texts(seed)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["short_0", "short_1"])
            for scene in captioned("train", lab.budget.texts // 2, seed=TEXT_SEED + seed, kinds=("short",)):
                rows.writerow(scene.captions["short"])


def make_teacher(lab: Lab, seed: int, teacher: str) -> None:
    """Stage 1, or two teachers in one."""
    from llm2clip.teacher.config import JoinConfig
    from llm2clip.teacher.join import join_teachers

    out = lab.teacher(seed, teacher)
    if is_complete(out):
        return
    if teacher == "joined":
        join_teachers(JoinConfig(teachers=(str(lab.teacher(seed, "lora")), str(CLIP)), out=out))
    else:
        texts = lab.texts(seed) if teacher == "lora-texts" else None
        arms.make_teacher(lab.folder(seed), LLM, lab.budget, seed, share=lab.share, tuning="lora", texts=texts)


def make_bank(lab: Lab, seed: int, teacher: str, dtype: str, content: str) -> None:
    """The vectors of the training captions, with their views or not, or of the captions without images."""
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    out, encoder, texts = lab.bank(seed, teacher, dtype, content), str(lab.teacher(seed, teacher)), content == "texts"
    data = (str(lab.texts(seed)),) if texts else arms.tars(lab.folder(seed), lab.share)
    views = VIEWS if content == "views" else {}
    if not is_complete(out):
        build_bank(BankConfig(data=data, teacher=encoder, out=out, dtype=dtype, text_only=texts, views=views))


def measure(lab: Lab, seed: int, name: str, arm: Arm | None) -> None:
    """Train an arm and score it; None is the mini CLIP itself."""
    folder, out, told = lab.folder(seed), lab.result(name, seed), {}
    model, teacher = CLIP, None
    if arm is not None:
        model, teacher = out.parent / "model", str(lab.teacher(seed, arm.teacher))
        costs = out.parent / "costs.json"  # of the training, which another split does not do again
        if not costs.exists():
            write_json(costs, train(lab, seed, arm, model))
        told = read_json(costs)
    scores = f"lab-{lab.split}/{out.parent.name}"
    arms.score(folder, model=str(model), teacher=teacher, name=scores, split=lab.split)
    found = scores_of(folder, scores)
    out.parent.mkdir(exist_ok=True)
    write_json(out, {**told, "scores": {column: found[column] for column in (*COLUMNS, *CLASSES)}})


def train(lab: Lab, seed: int, arm: Arm, out: Path) -> dict[str, float | None]:
    """Stage 2; returns its seconds, with or without inheriting, those of a step, and the peak of its memory in MiB."""
    from llm2clip.student.train import train_student

    banks = [lab.bank(seed, *bank) for bank in arm.banks()]
    config = arms.student_config(banks[0], CLIP, out, lab.budget, seed=seed, share=lab.share)
    config = dataclasses.replace(config, **{"inherit": "none", **arm.settings})
    if arm.texts:
        config = dataclasses.replace(config, inherit_bank=(str(banks[1]),))
    if config.inherit != "none":
        config = dataclasses.replace(config, inherit_cache=str(lab.folder(seed) / "lab" / "inherited"))
    forget_peak()
    start = time.monotonic()
    train_student(config)
    seconds = time.monotonic() - start
    rates = [json.loads(line)["images_per_second"] for line in (out / "log.jsonl").read_text().splitlines()]
    step = (config.batch_size or 0) / median(rates)
    return {"seconds": seconds, "step_ms": 1000 * step, "peak_mib": peak_mib()}


STATUS = Path("/proc/self/status")


def forget_peak() -> None:
    """Have the peak of this process's memory begin anew, where that can be."""
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")


def peak_mib() -> float | None:
    """The peak of this process's memory since."""
    if not STATUS.exists():
        return None
    return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Percent R@1 both ways and zero-shot accuracy, mean ± deviation over seeds, and the gap to the control."""
    kinds = [*TEST_KINDS, "mean", "gap to control", *SETS, "ms a step", "seconds", "MiB"]
    lines = [f"| arm | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    control = found.get(CONTROL)
    for name, runs in found.items():
        columns = {column: [100 * run["scores"][column] for run in runs] for column in (*COLUMNS, *CLASSES)}
        cells = [" / ".join(told(columns[f"{kind}/{way}_r@1"]) for way in ("i2t", "t2i")) for kind in TEST_KINDS]
        cells.append(told([mean_of(run) for run in runs]))
        gaps = [mean_of(run) - mean_of(other) for run, other in zip(runs, control or (), strict=False)]
        cells.append(told(gaps, sign="+") if gaps and name not in (CONTROL, PRETRAINED) else "")
        cells += [told(columns[name]) for name in CLASSES]
        for cost in ("step_ms", "seconds", "peak_mib"):
            cells.append(f"{mean(run[cost] for run in runs):.0f}" if runs[0].get(cost) else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_of(run: Mapping[str, Any]) -> float:
    """Over the retrieval columns of one seed, in percent."""
    return 100 * mean(run["scores"][column] for column in COLUMNS)


def told(values: Sequence[float], *, sign: str = "") -> str:
    """A mean with its spread over seeds.

    >>> told([1.0, 3.0], sign="+"), told([2.0])
    ('+2.0 ± 1.4', '2.0')
    """
    return f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
