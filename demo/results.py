"""The results of all pipelines as tables of mean and spread, and which of the paper's claims they bear out.

A cell is the mean over seeds; its spread is the standard deviation over seeds, or with one seed the standard error of
a share among so many test images. A gap counts as shown if it is more than twice its own spread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from demo import arms
from demo.classes import SETS
from demo.write import PER_KIND, TEST_KINDS, captioned
from llm2clip.artifacts import read_json

DATASET = "captions"
"""The name `evaluate` gives the test images: their CSV's."""
ARMS = ("A", "B", "B-long", "C-causal", "C", "D", "D-full")
DIRECTIONS = ("i2t", "t2i")
COLUMNS = tuple(f"{kind}/{direction}_r@1" for kind in TEST_KINDS for direction in DIRECTIONS)
CLASSES = tuple(f"classes/{kind}" for kind in SETS)
"""Zero-shot classification: what the mini CLIP knew, like its short captions."""
CRA_ENGLISH = ("short/cra", "long/cra", "short-long/cra")
CRA_BEYOND = ("short-unseen/cra", "short-es/cra", "short-zh/cra")
TEACHERS = {
    "raw-causal": "raw, causal",
    "raw-two-way": "raw, two-way",
    "lora": "stage 1, LoRA",
    "full": "stage 1, full",
}


@dataclass(frozen=True)
class Value:
    """A share in 0..1 measured once a seed, on `count` images each; or a gap between two such.

    Attributes:
        error: the standard error of a single sample; by default that of a share among `count`.
    """

    samples: tuple[float, ...]
    count: int
    error: float | None = None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return mean(self.samples)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; with one seed the standard error."""
        if len(self.samples) > 1:
            return stdev(self.samples)
        if self.error is not None:
            return self.error
        return math.sqrt(max(self.mean * (1 - self.mean), 1 / self.count / 4) / self.count)

    def minus(self, other: Value) -> Value:
        """The gap, seed by seed."""
        gaps = tuple(a - b for a, b in zip(self.samples, other.samples, strict=True))
        return Value(gaps, self.count, math.hypot(self.spread, other.spread) if len(gaps) == 1 else None)


@dataclass(frozen=True)
class Verdict:
    """A claim, whether it shows, and the gaps that say so."""

    claim: str
    shown: str
    detail: str


def collect(folders: Sequence[Path]) -> dict[str, dict[str, Value]]:
    """For each report of the pipelines ("D-all", "teacher-lora") its metrics, over the pipelines."""
    found: dict[str, dict[str, Value]] = {}
    num_classified = sum(1 for _ in (folders[0] / "data" / "test-classes" / SETS[0]).glob("*/*.png"))
    for path in sorted(report.parent for report in (folders[0] / "scores").glob("*/report.json")):
        count = read_json(path / "report.json")["datasets"][DATASET]["images"]
        runs = [scores_of(folder, path.name) for folder in folders]
        found[path.name] = {
            name: Value(tuple(run[name] for run in runs), num_classified if name in CLASSES else count)
            for name in runs[0]
        }
    return found


def scores_of(folder: Path, name: str) -> dict[str, float]:
    """Every metric of a model or teacher of one pipeline."""
    metrics = read_json(folder / "scores" / name / "report.json")["metrics"]
    found = {key.partition("/")[2]: value for key, value in metrics.items()}
    if (path := folder / arms.CLASSES / f"{name}.json").exists():
        found |= {column: read_json(path)[kind] for column, kind in zip(CLASSES, SETS, strict=True)}
    return found


def chance(folder: Path) -> dict[str, float]:
    """What a model that knows nothing would get, by column."""
    report = read_json(folder / "scores" / "A" / "report.json")
    return {name.partition("/")[2]: value for name, value in report["chance"].items()}


def ceilings(count: int, *, seed: int) -> dict[str, float]:
    """What a model that understands everything would get: a caption may be true of several images.

    Among the images a caption is true of, and among the captions true of an image, such a model can only guess. Long
    captions tell everything, so for them it is 1 but for equal scenes.
    """
    samples = list(captioned("test", count, seed=seed, kinds=TEST_KINDS))
    found = {}
    for kind in TEST_KINDS:
        if not samples[0].claims[kind]:
            continue
        true = [[[claim.holds(s.scene) for s in samples] for claim in sample.claims[kind]] for sample in samples]
        found[f"{kind}/t2i_r@1"] = mean(1 / sum(row) for rows in true for row in rows)
        holding = [sum(row[i] for rows in true for row in rows) for i in range(count)]
        found[f"{kind}/i2t_r@1"] = mean(PER_KIND / number for number in holding)
    return found


def verdicts(found: Mapping[str, Mapping[str, Value]]) -> list[Verdict]:
    """What shows here, in words made from the numbers alone; claims on arms that were not run are left out."""
    own, own_tenth = ("B-all", "B-long-all"), ("B-tenth", "B-long-tenth")
    every, beyond = _columns(*TEST_KINDS), _columns("unseen", "es", "zh")
    claims: list[tuple[str, str, tuple[str, ...], Sequence[str]]] = [
        (
            "Stage 1 repairs the LLM: its caption retrieval is far above the raw LLM's",
            "teacher-lora",
            ("teacher-raw-causal", "teacher-raw-two-way"),
            CRA_ENGLISH,
        ),
        ("D is above C (the raw LLM) on every column", "D-all", ("C-all", "C-causal-all"), every),
        ("D is above B and B-long on words never seen with an image", "D-all", own, _columns("unseen")),
        ("D is above B and B-long on foreign languages", "D-all", own, _columns("es", "zh")),
        ("D is above B (32 tokens) on long captions", "D-all", ("B-all",), _columns("long")),
        ("D is above B-long (128 tokens) on long captions", "D-all", ("B-long-all",), _columns("long")),
        ("D is above B and B-long on short captions in known words", "D-all", own, _columns("short")),
        ("A tenth of the pairs: D is above B and B-long on unseen words and languages", "D-tenth", own_tenth, beyond),
        (
            "A tenth of the pairs: D is above B and B-long on short and long captions",
            "D-tenth",
            own_tenth,
            _columns("short", "long"),
        ),
        ("Full fine-tuning in stage 1 is above LoRA on every column", "D-full-all", ("D-all",), every),
    ]
    return [
        _verdict(claim, [(f"{one} - {o}, {n}", found[one][n].minus(found[o][n])) for n in names for o in run])
        for claim, one, others, names in claims
        if one in found and (run := [other for other in others if other in found])
    ]


def _columns(*kinds: str) -> list[str]:
    return [f"{kind}/{direction}_r@1" for kind in kinds for direction in DIRECTIONS]


def _verdict(claim: str, gaps: list[tuple[str, Value]]) -> Verdict:
    """Shows if every gap is above twice its spread; the smallest and largest gaps are told."""
    clear = [gap.mean > 2 * gap.spread for _, gap in gaps]
    against = [gap.mean < -2 * gap.spread for _, gap in gaps]
    if all(clear):
        shown = "shows"
    elif any(clear):
        shown = f"shows in part ({sum(clear)} of {len(gaps)} comparisons)"
    elif any(against):
        shown = f"the reverse shows ({sum(against)} of {len(gaps)} comparisons)"
    else:
        shown = "does not show"
    smallest, largest = min(gaps, key=lambda g: g[1].mean), max(gaps, key=lambda g: g[1].mean)
    detail = "; ".join(
        f"{word} gap {100 * gap.mean:+.1f} ± {100 * gap.spread:.1f} points ({name})"
        for word, (name, gap) in (("smallest", smallest), ("largest", largest))
    )
    return Verdict(claim, shown, detail)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Loss by step of every training of a pipeline."""
    found = {}
    for path in sorted([*folder.glob("teachers/*/log.jsonl"), *folder.glob("models/*/log.jsonl")]):
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        name = f"{'stage 1' if path.parent.parent.name == 'teachers' else 'stage 2'} {path.parent.name}"
        found[name] = [(int(e["step"]), float(e["loss"])) for e in entries if "loss" in e]
    for path in sorted(folder.glob("models/*/log.json")):
        found[f"stage 2 {path.parent.name}"] = [(int(e["step"]), float(e["loss"])) for e in read_json(path)]
    return found


def as_json(found: Mapping[str, Mapping[str, Value]]) -> dict[str, Any]:
    """Everything measured, a list of one number a seed."""
    return {name: {key: list(value.samples) for key, value in values.items()} for name, values in found.items()}
