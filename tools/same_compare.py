"""Where two folders of results part: logs step by step, then weights and vectors, then reports and manifests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from tools import same_grid as grid

ORDER = (".jsonl", ".safetensors", ".parquet", ".arrow")
"""Files that are compared first; what they show explains the rest."""
SHOWN = 3
"""Differences of a file that are printed."""
Where = tuple[Path, Path]
"""A side's folder of results and its checkout."""


class Part(NamedTuple):
    """A place where old and new part, what each has, and by how much numbers differ."""

    place: str
    text: str
    absolute: float = 0.0
    relative: float = 0.0

    @property
    def file(self) -> str:
        """The file of the place."""
        return self.place.partition(" ")[0]


def allowed(row: str, place: str) -> str | None:
    """Why the two may part at a place of a row, if they may."""
    return next((why for rows, places, why in grid.ALLOWED if fnmatch(row, rows) and fnmatch(place, places)), None)


class Folders:
    """The results of both sides."""

    def __init__(self, old: Where, new: Where) -> None:
        self.old, self.new = old, new

    def plain(self, *texts: str) -> list[str]:
        """The old and the new text without the names of their sides' folders."""
        sides = zip(texts, (self.old, self.new), strict=True)
        return [text.replace(str(folder), "FOLDER").replace(str(code), "CHECKOUT") for text, (folder, code) in sides]

    def compare(self, old_name: str, new_name: str, verb: str) -> list[Part]:
        """Where the folders of two rows part."""
        old, new = self.old[0] / old_name, self.new[0] / new_name
        files = {str(path.relative_to(top)) for top in (old, new) for path in top.rglob("*") if path.is_file()}
        parts = []
        for file in sorted(files, key=lambda f: (ORDER.index(Path(f).suffix) if Path(f).suffix in ORDER else 9, f)):
            inside = verb in grid.BANK_VERBS and file not in ("manifest.json", "run.json")
            if inside or any(fnmatch(Path(file).name, pattern) for pattern in grid.LEFT_OUT):
                continue
            if (old / file).exists() and (new / file).exists():
                parts += self._compare_files(old / file, new / file, file, verb)
            else:
                parts.append(Part(file, f"only in the {'old' if (old / file).exists() else 'new'}"))
        return parts

    def _compare_files(self, old: Path, new: Path, file: str, verb: str) -> Iterator[Part]:
        if old.suffix == ".safetensors":
            return walk(read_tensors(old), read_tensors(new), f"{file} ")
        if old.suffix in (".parquet", ".arrow"):
            return walk(read_table(old), read_table(new), f"{file} ")
        a, b = self.plain(*(path.read_text(encoding="utf-8", errors="surrogateescape") for path in (old, new)))
        if old.suffix == ".jsonl":
            return walk(
                *(steps([tidy(json.loads(line), verb) for line in text.splitlines()]) for text in (a, b)), f"{file} "
            )
        if old.suffix == ".json":
            return walk(tidy(json.loads(a), verb), tidy(json.loads(b), verb), f"{file} ")
        return compare_text(a, b, file)


def compare_printed(old: str, new: str, verb: str) -> Iterator[Part]:
    """Where what two commands printed parts."""
    if old.startswith("{") and new.startswith("{"):
        return walk(tidy(json.loads(old), verb), tidy(json.loads(new), verb), "stdout ")
    return compare_text(old, new, "stdout")


def compare_text(old: str, new: str, place: str) -> Iterator[Part]:
    """Where two texts part, but for times and dates."""
    return walk(*(re.sub(grid.VOLATILE_TEXT, "#", text).splitlines() for text in (old, new)), f"{place} line ")


def steps(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The lines of a log by step; a step may have a second line, of scores."""
    named: dict[str, Any] = {}
    for line in lines:
        name = f"step {line.get('step')}"
        named[f"{name} scores" if name in named else name] = line
    return named


def tidy(value: Any, verb: str) -> Any:
    """JSON with the new code's names, without what no two runs share and without flags of one side alone."""
    if isinstance(value, list):
        return [tidy(item, verb) for item in value]
    if not isinstance(value, dict):
        return value
    names = {**grid.RENAMED.get(verb, {}), **grid.RENAMED_OUTPUT}
    gone = {*grid.REMOVED.get(verb, {}), *grid.ADDED.get(verb, {})}
    kept = {names.get(key, key): tidy(item, verb) for key, item in value.items() if key not in grid.VOLATILE}
    if isinstance(settings := kept.get("config"), dict):
        kept["config"] = {key: item for key, item in settings.items() if key not in gone}
    return kept


def walk(old: Any, new: Any, place: str) -> Iterator[Part]:
    """Where two values part: dicts by key, lists by place, tensors as wholes, all else to the last digit."""
    import torch

    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if key in old and key in new:
                yield from walk(old[key], new[key], f"{place}{key}/")
            else:
                yield Part(f"{place}{key}", f"only in the {'old' if key in old else 'new'}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from walk(a, b, f"{place}{i}/")
    elif torch.is_tensor(old) and torch.is_tensor(new) and (old.dtype, old.shape) == (new.dtype, new.shape):
        yield from compare_tensors(old, new, place.strip("/ "))
    elif torch.is_tensor(old) or type(old) is not type(new) or (old != new and not old != old != new != new):
        said = [f"{v.dtype} {list(v.shape)}" if torch.is_tensor(v) else json.dumps(v)[:80] for v in (old, new)]
        numbers = [float(v) if isinstance(v, (int, float)) else 0.0 for v in (old, new)]
        distance = abs(numbers[0] - numbers[1])
        yield Part(place.strip("/ "), " | ".join(said), distance, distance / max(*map(abs, numbers), 1e-300))


def compare_tensors(old: Any, new: Any, place: str) -> Iterator[Part]:
    """How two tensors of one shape and dtype part."""
    a, b = old.double(), new.double()
    distance = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    if count := int(distance.count_nonzero()):
        relative = (distance / a.abs().maximum(b.abs())).masked_fill(distance == 0, 0.0)
        yield Part(place, f"{count} of {a.numel()} numbers", float(distance.max()), float(relative.max()))


def read_tensors(path: Path) -> dict[str, Any]:
    """Name -> tensor."""
    from safetensors.torch import load_file

    return load_file(path)


def read_table(path: Path) -> dict[str, Any]:
    """Column -> list, or tensor where it holds vectors."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_stream(path).read_all()
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return {name: torch.tensor(c) if c and isinstance(c[0], list) else c for name, c in columns.items()}


def summary(parts: list[Part]) -> str:
    """Lines that say where a row parts: of each file the first places, how many there are, the largest differences."""
    lines = []
    for file in dict.fromkeys(part.file for part in parts):
        here = [part for part in parts if part.file == file]
        for part in here[:SHOWN]:
            size = f"   (abs {part.absolute:.3g}, rel {part.relative:.3g})" if part.absolute else ""
            lines.append(f"       {part.place}: {part.text}{size}")
        if len(here) > SHOWN:
            most, least = max(here, key=lambda p: p.absolute), max(here, key=lambda p: p.relative)
            lines.append(
                f"       {file}: {len(here)} places in all; largest abs {most.absolute:.3g} ({most.place}), "
                f"rel {least.relative:.3g} ({least.place})"
            )
    return "\n".join(lines)
