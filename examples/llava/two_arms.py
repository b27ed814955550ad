"""Several towers in one LLaVA, all else equal, and one table: `python -m examples.llava.two_arms --help`.

Each arm of each seed is made, trained in two stages and scored; what is done is not done again. For several GPUs, and
for training that differs between arms, type the commands of README.md one by one.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.llava.make_llava import MakeConfig, make_llava, run
from examples.llava.score import ONE_WORD, TESTS, ScoreConfig, read_lines, read_tsv, score
from examples.llava.train import TrainConfig, train
from llm2clip.artifacts import read_json, write_json
from llm2clip.config import check_choice
from llm2clip.errors import UsageError, setting

logger = logging.getLogger("llm2clip")
BLIND_FOLDER = "blind"
BLIND, CONSTANT = "blind (no image)", "always the commonest answer"


@dataclass(frozen=True, kw_only=True)
class ArmsConfig:
    """Compare vision towers in a LLaVA-1.5: the same LLM, data, seeds and tests, one table."""

    arms: dict[str, str]
    """NAME TOWER of each arm: folders of `llm2clip export --to tower`, or Hub ids."""
    llm: str
    """The LLM, folder or Hub id."""
    captions: tuple[Path, Path]
    """Stage 1: LLaVA's JSON, and what its images' paths begin in."""
    instructions: tuple[Path, Path]
    """Stage 2: the same."""
    tests: dict[str, tuple[str, Path, Path]]
    """NAME TEST FILE IMAGES of each test; TEST is pope, words or mmbench (whose file holds its images)."""
    out: Path
    """Folder of everything; OUT/table.md is the table."""
    template: str | None = None
    """As of make_llava."""
    seeds: int = 1
    """Runs of each arm, with seeds SEED, SEED+1, ...; the table then shows means and their spread."""
    seed: int = 0
    """The first seed."""
    blind: bool = True
    """One arm more, that trains stage 2 and is asked without images."""
    dtype: str = "auto"
    """As of make_llava."""
    suffix: str = ONE_WORD
    """As of score."""
    stage_1: dict[str, float] = field(default_factory=dict)
    """Settings of train in stage 1 that are not LLaVA's, such as `micro-batch-size 8`."""
    stage_2: dict[str, float] = field(default_factory=dict)
    """The same in stage 2, such as `lora-rank 128`."""


def compare(config: ArmsConfig) -> Path:
    """Run what is missing and write the table; returns it.

    Raises:
        UsageError: if there is nothing to compare.
    """
    if not config.arms or not config.tests:
        raise UsageError(f"give {setting('arms')} and {setting('tests')} at least one each")
    if unknown := [test for test, _, _ in config.tests.values() if test not in TESTS]:
        raise UsageError(f"{setting('tests')}: {unknown[0]} is none of {', '.join(TESTS)}")
    files = [config.captions[0], config.instructions[0], *(path for _, path, _ in config.tests.values())]
    if missing := [path for path in files if not path.is_file()]:
        raise UsageError(f"{missing[0]} is no file; give one that is there")
    if BLIND_FOLDER in config.arms:
        raise UsageError(f"{setting('arms')}: {BLIND_FOLDER} is the arm without images; give this one another name")
    for stage, options in ((1, config.stage_1), (2, config.stage_2)):
        check_options(stage, options)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        for name, tower in config.arms.items():
            folder = config.out / f"seed-{seed}" / name
            _add(found, name, run_arm(config, tower, folder, seed=seed))
        if config.blind:
            folder, tower = config.out / f"seed-{seed}" / BLIND_FOLDER, next(iter(config.arms.values()))
            _add(found, BLIND, run_arm(config, tower, folder, seed=seed, blind=True))
    return write_table(config.out, found, constant(config))


def _add(found: dict[str, dict[str, list[float]]], arm: str, scores: Mapping[str, float]) -> None:
    for test, value in scores.items():
        found.setdefault(arm, {}).setdefault(test, []).append(value)


def run_arm(config: ArmsConfig, tower: str, folder: Path, *, seed: int, blind: bool = False) -> dict[str, float]:
    """Accuracy by test of one arm with one seed."""
    logger.info("%s", folder)
    model = make_llava(
        MakeConfig(
            tower=tower, llm=config.llm, template=config.template, dtype=config.dtype, seed=seed, out=folder / "made"
        )
    )
    data, images = config.captions
    if not blind:
        options = whole_numbers(config.stage_1)
        model = train(
            TrainConfig(model=model, data=data, images=images, out=folder / "1", stage=1, seed=seed, **options)
        )
    data, images = config.instructions
    options = whole_numbers(config.stage_2)
    model = train(
        TrainConfig(model=model, data=data, images=images, out=folder / "2", stage=2, seed=seed, blind=blind, **options)
    )
    scores = {}
    for name, (test, questions, images) in config.tests.items():
        result = folder / f"{name}.json"
        if not result.exists():
            score(
                ScoreConfig(
                    model=model, test=test, data=questions, images=images, out=result, suffix=config.suffix, blind=blind
                )
            )
        scores[name] = read_json(result)["scores"]["accuracy"]
    return scores


def whole_numbers(options: Mapping[str, float]) -> dict[str, Any]:
    """Settings as TrainConfig has them: names with underscores, whole numbers whole.

    >>> whole_numbers({"lora-rank": 8.0, "learning-rate": 0.001})
    {'lora_rank': 8, 'learning_rate': 0.001}
    """
    named = {name.replace("-", "_"): value for name, value in options.items()}
    return {name: int(value) if value == int(value) and name != "epochs" else value for name, value in named.items()}


def check_options(stage: int, options: Mapping[str, float]) -> None:
    """Raise if train would not take them.

    Raises:
        UsageError: for an unknown setting or an impossible value.
    """
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in whole_numbers(options):
        check_choice(setting(f"stage_{stage}"), name, known)
    place = Path()
    TrainConfig(model=place, data=place, images=place, out=place, stage=stage, **whole_numbers(options))


def constant(config: ArmsConfig) -> dict[str, list[float]]:
    """What always giving the commonest label would score."""
    found = {}
    for name, (test, path, images) in config.tests.items():
        labels = [q.label for q in (read_tsv(path) if test == "mmbench" else read_lines(path, images, ""))]
        found[name] = [max(map(labels.count, set(labels))) / len(labels)]
    return found


def write_table(out: Path, found: Mapping[str, Mapping[str, Sequence[float]]], least: Mapping[str, Any]) -> Path:
    """`table.md`: accuracy in percent by arm and test, mean and standard deviation over seeds; `results.json`, too."""
    tests = list(least)
    lines = [f"| | {' | '.join(tests)} | mean |", "|---" * (len(tests) + 2) + "|"]
    for arm, scores in {**found, CONSTANT: least}.items():
        by_seed = [statistics.mean(values) for values in zip(*(scores[test] for test in tests), strict=True)]
        lines.append(f"| {arm} | {' | '.join(shown([*map(scores.get, tests), by_seed]))} |")
    write_json(out / "results.json", {**found, CONSTANT: least})
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    logger.info("%s", "\n".join(lines))
    return out / "table.md"


def shown(columns: Sequence[Sequence[float]]) -> list[str]:
    """Means in percent, with the spread where there are several seeds.

    >>> shown([[0.5], [0.25, 0.75]])
    ['50.0', '50.0 ± 35.4']
    """
    spread = [f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "" for values in columns]
    return [f"{100 * statistics.mean(values):.1f}{more}" for values, more in zip(columns, spread, strict=True)]


if __name__ == "__main__":
    run(ArmsConfig, compare)
