"""What a run learns from and is probed with: all sources read once into the run's work folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llm2clip.artifacts import read_json, write_json
from llm2clip.data.bad import BadSamples
from llm2clip.data.source import open_source
from llm2clip.errors import UsageError, setting
from llm2clip.teacher.config import CAPTIONS_TASK, TeacherConfig, for_eval
from llm2clip.teacher.mixture import Task, parse_kinds, task_weights
from llm2clip.teacher.probe import CaptionSet, first_captions, sampled_captions
from llm2clip.teacher.store import share_of_negatives, store_captions, store_triplets

logger = logging.getLogger("llm2clip")


def check_tasks(config: TeacherConfig) -> None:
    """Raise if settings name tasks that are not there; asked before the captions are read.

    Raises:
        UsageError: naming what there is.
    """
    names = config.task_names
    if len(set(names)) < len(names):
        raise UsageError(f"{setting('text_pairs')}: two tasks have one name ({', '.join(names)}); rename a file")
    for name in config.instructions:
        if name not in names:
            raise UsageError(f"{setting('instructions')} {name}: no such task; there are {', '.join(names)}")
    task_weights(names, config.source_weights)
    parse_kinds(config.pair_weights)


def prepare_tasks(config: TeacherConfig, work: Path) -> tuple[list[Task], dict[str, Any]]:
    """The tasks, read into `work` unless they are there, and what the manifest says of them.

    Raises:
        SourceError: if a source cannot be read or has nothing to learn from.
        TooManyBadSamples: if more samples are bad than allowed.
    """
    tasks: list[Task] = []
    facts: dict[str, Any] = {}
    if config.data:
        task, facts = _captions(config, work)
        tasks.append(task)
    for i, file in enumerate(map(Path, config.text_pairs)):
        bad = BadSamples(config.max_bad_fraction)
        rows, read = store_triplets(work / f"text{i}.arrow", file, bad=bad)
        given = share_of_negatives(rows)
        if 0 < given < 1 and not config.random_negative:
            logger.warning(
                "%s: its negatives are not used: %.0f%% of the rows have one, and %s leaves the others without",
                file,
                100 * given,
                setting("random_negative", False),
            )
        tasks.append(
            Task(
                name=file.stem,
                rows=rows,
                instruction=config.instructions.get(file.stem, read["instruction"]),
                negatives=config.random_negative or given == 1,
            )
        )
        facts[f"bad_rows_{file.stem}"] = read["bad"]
    facts["rows"] = {task.name: len(task) for task in tasks}
    return tasks, facts


def prepare_probe(config: TeacherConfig, tasks: list[Task]) -> CaptionSet:
    """The captions to score before and after: held-out ones, else some of the training's; none for text tasks alone.

    Raises:
        UsageError, SourceError: if held-out captions were named and cannot be read, or none pair.
    """
    if config.eval_data:
        source = open_source(for_eval(config), pictures=False, setting="eval_data")
        held_out = first_captions(source, limit=config.eval_pictures)
        if not held_out:
            raise UsageError(
                f"{setting('eval_data')} {' '.join(config.eval_data)}: no picture has two different captions"
            )
        return held_out
    return sampled_captions(tasks[0].rows, limit=config.eval_pictures, seed=config.seed) if config.data else []


def _captions(config: TeacherConfig, work: Path) -> tuple[Task, dict[str, Any]]:
    source = open_source(config, pictures=False)
    kinds, same = parse_kinds(config.pair_weights), config.positives == "same"
    path, read = work / "captions.arrow", work / "captions.json"
    if not read.exists():  # killed before what was bad was noted
        path.unlink(missing_ok=True)
    rows = store_captions(path, source, kinds=kinds, same=same, bad=source.bad)
    if not read.exists():
        write_json(read, {"source_fingerprint": source.fingerprint, "bad_samples": source.bad.to_json()})
    task = Task(
        name=CAPTIONS_TASK,
        rows=rows,
        instruction=config.caption_instruction,
        negatives=config.random_negative,
        kinds=kinds,
        same=same,
    )
    return task, read_json(read)
