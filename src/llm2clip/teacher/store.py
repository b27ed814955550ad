"""Tasks on disk: captions and text triplets are read once, checked, and written as Arrow files for random access."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm2clip.artifacts import atomic_path, read_json, write_json
from llm2clip.data.bad import BadSamples
from llm2clip.data.pairs import Kinds, possible_pairs
from llm2clip.data.sample import Sample
from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.progress import track
from llm2clip.teacher.mixture import text_key

logger = logging.getLogger("llm2clip")
ROWS_PER_CHUNK = 1000
MAX_CHARACTERS = 100_000
"""Longest text taken; a longer one is no caption but a mistake, and tokenising it takes seconds."""
FILE_NAME = re.compile(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
"""A caption that is nothing else comes from the wrong column."""
TRIPLET_FIELDS = ("query", "positive", "negative", "instruction")


def open_rows(path: Path) -> Any:
    """Random access to the rows of an Arrow file, through a memory map."""
    import datasets

    return datasets.Dataset.from_file(str(path))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]) -> int:
    """Write `rows` as an Arrow stream file at `path`, and return how many there were."""
    import pyarrow as pa

    schema, count = pa.schema(list(fields.items())), 0
    remaining = iter(rows)
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        while chunk := list(itertools.islice(remaining, ROWS_PER_CHUNK)):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))
            count += len(chunk)
    return count


def store_captions(
    path: Path, source: Iterable[Sample], *, kinds: Mapping[Kinds, float] | None, same: bool, bad: BadSamples
) -> Any:
    """Write the pictures that have a pair of captions to `path`, unless it is there, and open it.

    Args:
        kinds: kinds that may pair; pictures without such a pair are left out, and counted in the log.
        same: one caption is enough, it pairs with itself.
        bad: counts captions that cannot be used.

    Raises:
        SourceError: if no picture is left.
        TooManyBadSamples: if more pictures than allowed lost their pairs to captions that cannot be used.
    """
    if not path.exists():
        import pyarrow as pa

        stored = _CaptionRows(source, kinds=kinds, same=same, bad=bad)
        count = write_rows(path, stored, {"kinds": pa.list_(pa.string()), "texts": pa.list_(pa.string())})
        if not count:
            needed = "a caption" if same else f"two different captions{_allowed(kinds)}"
            found = ", ".join(sorted(stored.found)) or "none"
            raise SourceError(
                f"no picture of {setting('data')} has {needed}; the kinds are {found}; give more caption columns with "
                f"{setting('captions', {'KIND': 'COLUMN'})}"
            )
        logger.info("captions: %s pictures to learn from", f"{count:,}")
    return open_rows(path)


def store_triplets(path: Path, file: Path, *, bad: BadSamples) -> tuple[Any, dict[str, Any]]:
    """Write the triplets of a JSONL `file` to `path`, unless it is there; returns them opened, and facts.

    The facts are the file's `instruction`, and what was `bad` when it was read.

    Raises:
        SourceError: if the file cannot be read, is no JSONL of text triplets, or has no usable row.
        TooManyBadSamples: if more rows are bad than allowed.
    """
    facts = path.with_suffix(".json")
    if not (path.exists() and facts.exists()):
        import pyarrow as pa

        rows = _TripletFile(file, bad)
        write_rows(path, rows, {name: pa.string() for name in ("query", "positive", "negative")})
        bad.check(rows.seen)
        write_json(facts, {"instruction": rows.instruction or "", "bad": bad.to_json()})
    return open_rows(path), read_json(facts)


def share_of_negatives(rows: Any) -> float:
    """How many of the triplets name their negative."""
    return 1 - float(rows.data.column("negative").null_count) / len(rows)


class _CaptionRows:
    """The captions of the pictures that have a pair; what cannot be a caption is left out and counted."""

    def __init__(
        self, source: Iterable[Sample], *, kinds: Mapping[Kinds, float] | None, same: bool, bad: BadSamples
    ) -> None:
        self.source, self.kinds, self.same, self.bad = source, kinds, same, bad
        self.found: dict[str, None] = {}

    def __iter__(self) -> Iterator[dict[str, list[str]]]:
        seen = unpaired = lost = 0
        for sample in track(self.source, description="read captions", unit="pictures"):
            seen += 1
            captions, faults = _usable(sample)
            self.found.update(dict.fromkeys(captions))
            for fault in faults:
                self.bad.note(sample.id, *fault)
            if self._pairs(captions):
                yield {
                    "kinds": [kind for kind, texts in captions.items() for _ in texts],
                    "texts": [text for texts in captions.values() for text in texts],
                }
            else:
                unpaired += 1
                lost += bool(faults)
        self.bad.num_bad += lost
        self.bad.check(seen + self.bad.num_bad - lost)
        if unpaired:
            logger.warning(
                "%s pictures have no two different captions%s and are not used", f"{unpaired:,}", _allowed(self.kinds)
            )

    def _pairs(self, captions: Mapping[str, list[str]]) -> bool:
        pairs = possible_pairs(captions)
        if self.kinds is not None:
            pairs = {pair: found for pair, found in pairs.items() if self.kinds.get(pair, 0) > 0}
        return bool(pairs or (self.same and captions))


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


def _allowed(kinds: Mapping[Kinds, float] | None) -> str:
    return f" of the kinds {', '.join('+'.join(pair) for pair in kinds)}" if kinds else ""


class _TripletFile:
    """The usable triplets of a JSONL file; counts the bad ones, and notes the file's one instruction."""

    def __init__(self, path: Path, bad: BadSamples) -> None:
        self.path, self.bad, self.seen = path, bad, 0
        self.instruction: str | None = None

    def __iter__(self) -> Iterator[dict[str, str | None]]:
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self.seen += 1
                        row = self._parse(number, line)
                        if row is not None:
                            yield row
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{setting('text_pairs')} {self.path} cannot be read: {error}") from None
        if not self.seen:
            raise SourceError(f"{setting('text_pairs')} {self.path} holds no text; leave the file out")

    def _parse(self, number: int, line: str) -> dict[str, str | None] | None:
        where = f"{self.path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{setting('text_pairs')} {self.path}, line {number} is no JSON ({error.msg})") from None
        if not isinstance(row, dict) or "query" not in row or "positive" not in row:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise SourceError(
                f"{setting('text_pairs')} {self.path}, line {number} needs the keys query and positive (negative, "
                f"instruction if any); it has {found}"
            )
        self._note_instruction(where, row.get("instruction"))
        texts = {name: _as_text(row.get(name)) for name in TRIPLET_FIELDS[:3]}
        fault = _fault(texts, row.get("negative"))
        if fault:
            self.bad.add(where, fault)
            return None
        return texts

    def _note_instruction(self, where: str, instruction: Any) -> None:
        instruction = instruction or ""
        if self.instruction is None:
            self.instruction = str(instruction)
        elif instruction != self.instruction:
            raise UsageError(
                f"{setting('text_pairs')} {where}: instruction {str(instruction)[:60]!r} differs from "
                f"{self.instruction[:60]!r}; give each task its own file"
            )


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
