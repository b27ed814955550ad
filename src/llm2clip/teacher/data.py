"""What a run learns from and is probed with: captions and text triplets, read once, checked, kept as Arrow files."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter

from llm2clip.artifacts import atomic_path, read_json, write_json
from llm2clip.data.bad import BadSamples
from llm2clip.data.pairs import Kinds, possible_pairs
from llm2clip.data.sample import Sample
from llm2clip.data.source import Source, open_source
from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.progress import track
from llm2clip.teacher.config import CAPTIONS_TASK, TeacherConfig, for_eval
from llm2clip.teacher.mixture import Task, parse_kinds, task_weights, text_key
from llm2clip.teacher.probe import CaptionSet, first_captions, sampled_captions

logger = logging.getLogger("llm2clip")
MAX_CHARACTERS = 100_000
"""Longest text taken; a longer one is no caption but a mistake, and tokenising it takes seconds."""
FILE_NAME = re.compile(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
"""A caption that is nothing else comes from the wrong column."""
TRIPLET, TEXT = ("query", "positive", "negative"), Value("string")


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
        source = open_source(config, images=False)
        kinds, same = parse_kinds(config.pair_weights), config.positives == "same"
        rows, facts = store_captions(work / "captions.arrow", source, kinds=kinds, same=same, bad=source.bad)
        tasks.append(
            Task(
                name=CAPTIONS_TASK,
                rows=rows,
                instruction=config.caption_instruction,
                negatives=config.random_negative,
                kinds=kinds,
                same=same,
            )
        )
    for i, file in enumerate(map(Path, config.text_pairs)):
        rows, read = store_triplets(work / f"text{i}.arrow", file, bad=BadSamples(config.max_bad_fraction))
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
        source = open_source(for_eval(config), images=False, setting="eval_data")
        held_out = first_captions(source, limit=config.eval_images)
        if not held_out:
            raise UsageError(
                f"{setting('eval_data')} {' '.join(config.eval_data)}: no image has two different captions"
            )
        return held_out
    return sampled_captions(tasks[0].rows, limit=config.eval_images, seed=config.seed) if config.data else []


def stored(
    path: Path, rows: Iterable[dict[str, Any]], fields: Mapping[str, Any], facts: Callable[[], dict[str, Any]] = dict
) -> tuple[Any, dict[str, Any]]:
    """Random access to the rows in the Arrow file `path`, through a memory map, and facts about them.

    The rows are written there first if an earlier run did not: gone through once, a thousand at a time in memory.

    Args:
        facts: asked when the rows were all gone through; noted beside them, last.
    """
    noted = path.with_suffix(".json")
    if not noted.exists():
        with atomic_path(path) as temporary, ArrowWriter(path=str(temporary), features=Features(fields)) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        write_json(noted, facts())
    return Dataset.from_file(str(path)), read_json(noted)


def store_captions(
    path: Path, source: Source, *, kinds: Mapping[Kinds, float] | None, same: bool, bad: BadSamples
) -> tuple[Any, dict[str, Any]]:
    """The images of a source that have a pair of captions, stored at `path`, and what was bad when they were read.

    Args:
        kinds: kinds that may pair; images without such a pair are left out, and counted in the log.
        same: one caption is enough, it pairs with itself.
        bad: counts captions that cannot be used.

    Raises:
        SourceError: if no image is left.
        TooManyBadSamples: if more images than allowed lost their pairs to captions that cannot be used.
    """
    return stored(
        path,
        _paired(source, kinds=kinds, same=same, bad=bad),
        {"kinds": [TEXT], "texts": [TEXT]},
        lambda: {"source_fingerprint": source.fingerprint, "bad_samples": bad.to_json()},
    )


def _paired(
    source: Iterable[Sample], *, kinds: Mapping[Kinds, float] | None, same: bool, bad: BadSamples
) -> Iterator[dict[str, list[str]]]:
    """The captions of the images that have a pair; what cannot be a caption is left out and counted."""
    found: set[str] = set()
    seen = kept = lost = 0
    for sample in track(source, description="read captions", unit="images"):
        seen += 1
        captions, faults = _usable(sample)
        found.update(captions)
        for fault in faults:
            bad.note(sample.id, *fault)
        pairs = possible_pairs(captions)
        if any(kinds is None or kinds.get(pair, 0) > 0 for pair in pairs) or (same and captions):
            kept += 1
            yield {
                "kinds": [kind for kind, texts in captions.items() for _ in texts],
                "texts": [text for texts in captions.values() for text in texts],
            }
        else:
            lost += bool(faults)
    bad.num_bad += lost
    bad.check(seen + bad.num_bad - lost)
    allowed = f" of the kinds {', '.join('+'.join(pair) for pair in kinds)}" if kinds else ""
    if not kept:
        needed = "a caption" if same else f"two different captions{allowed}"
        alone = "" if same else f", or {setting('positives', 'same')} {setting('attention_dropout', 0.3)} for one each"
        raise SourceError(
            f"no image of {setting('data')} has {needed}; the kinds are {', '.join(sorted(found)) or 'none'}; give "
            f"more caption columns with {setting('captions', {'KIND': 'COLUMN'})}{alone}"
        )
    if kept < seen:
        logger.warning("%s images have no two different captions%s and are not used", f"{seen - kept:,}", allowed)
    logger.info("captions: %s images to learn from", f"{kept:,}")


def _usable(sample: Sample) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """The captions of a sample that can be ones, by kind, and what is wrong with the others: cause and detail."""
    captions: dict[str, list[str]] = {}
    faults = []
    for kind, texts in sample.captions.items():
        for text in texts:
            if len(text) > MAX_CHARACTERS:
                faults.append(("caption too long", f"{kind} has {len(text):,} characters; at most {MAX_CHARACTERS:,}"))
            elif FILE_NAME.fullmatch(text):
                faults.append(
                    ("caption is a file name", f"{kind} is {text[:80]}; see {setting('captions', {'KIND': 'COLUMN'})}")
                )
            else:
                captions.setdefault(kind, []).append(text)
    return captions, faults


def store_triplets(path: Path, file: Path, *, bad: BadSamples) -> tuple[Any, dict[str, Any]]:
    """The triplets of a JSONL `file`, stored at `path`, and facts about them.

    The facts are the file's `instruction`, and what was `bad` when it was read.

    Raises:
        SourceError: if the file cannot be read, is no JSONL of text triplets, or has no usable row.
        UsageError: if its rows have several instructions.
        TooManyBadSamples: if more rows are bad than allowed.
    """
    facts = {"instruction": ""}
    rows = _triplets(file, facts, bad=bad)
    return stored(path, rows, dict.fromkeys(TRIPLET, TEXT), lambda: {**facts, "bad": bad.to_json()})


def share_of_negatives(rows: Any) -> float:
    """How many of the triplets name their negative."""
    return 1 - float(rows.data.column("negative").null_count) / len(rows)


def _triplets(path: Path, facts: dict[str, str], *, bad: BadSamples) -> Iterator[dict[str, str | None]]:
    """The usable triplets of a file; its one instruction goes into `facts`."""
    seen = 0
    for number, row in _rows_of(path):
        where, instruction = f"{path.name}:{number}", str(row.get("instruction") or "")
        if seen and instruction != facts["instruction"]:
            raise UsageError(
                f"{setting('text_pairs')} {where}: instruction {instruction[:60]!r} differs from "
                f"{facts['instruction'][:60]!r}; give each task its own file"
            )
        seen, facts["instruction"] = seen + 1, instruction
        texts = {name: _as_text(row.get(name)) for name in TRIPLET}
        fault = _fault(texts, row.get("negative"))
        if fault:
            bad.add(where, fault)
        else:
            yield texts
    if not seen:
        raise SourceError(f"{setting('text_pairs')} {path} holds no text; leave the file out")
    bad.check(seen)


def _rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with the numbers of their lines; one that is none, or no triplet, ends the run."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or "query" not in row or "positive" not in row:
                    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise SourceError(
                        f"{setting('text_pairs')} {path}, line {number} needs the keys query and positive (negative, "
                        f"instruction if any); it has {found}"
                    )
                yield number, row
    except json.JSONDecodeError as error:
        raise SourceError(f"{setting('text_pairs')} {path}, line {number} is no JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{setting('text_pairs')} {path} cannot be read: {error}") from None


def _as_text(value: Any) -> str | None:
    """A text, or the first of a list of texts; None if it is neither or empty."""
    if isinstance(value, list) and value:
        value = value[0]
    return value.strip() or None if isinstance(value, str) else None


def _fault(texts: Mapping[str, str | None], negative: Any) -> str | None:
    if texts["query"] is None or texts["positive"] is None:
        return "no text in query or positive"
    if negative is not None and texts["negative"] is None:
        return "negative is no text"
    if texts["negative"] is not None and text_key(texts["negative"]) == text_key(texts["positive"]):
        return "negative equals positive"
    if max(len(text or "") for text in texts.values()) > MAX_CHARACTERS:
        return "text too long"
    return None
