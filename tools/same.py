"""Does this checkout compute what an older one did? Both run one grid of commands; every figure is compared exactly.

`scripts/same OLD_CHECKOUT [--only WORD...] [--out DIR] [--quick] [--new CHECKOUT]`. The tables are in `same_grid.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tools import same_grid as grid

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tools" / "same_drive.py"
SHOWN = 3
"""Differences printed of each file; all are in same.json."""
Fields = dict[str, dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One command of the grid."""

    name: str
    verb: str
    words: dict[str, list[str]]
    base: str | None = None
    """The row whose results this one must change."""
    launch: str = ""
    """Empty: in the common process; else "torchrun" or "compile", in its own."""
    encode: tuple[str, str | None] | None = None

    def argv(self, *, old: bool) -> list[str]:
        """What is typed behind `llm2clip`; the old code is given its own names of flags."""
        names = {new: before for before, new in grid.RENAMED.get(self.verb, {}).items()} if old else {}
        typed = self.verb.split() if self.verb else []
        for flag, values in self.words.items():
            no = "no-" if flag.startswith("no-") else ""
            name = flag.removeprefix(no).replace("-", "_")
            typed += [f"--{no}{names.get(name, name).replace('_', '-')}"] if flag else []
            typed += values
        return typed

    @property
    def fields(self) -> set[str]:
        """The fields of the config that are set."""
        return {flag.removeprefix("no-").replace("-", "_") for flag in self.words if flag}


@dataclass
class Part:
    """One place where old and new part."""

    place: str
    text: str
    absolute: float = 0.0
    relative: float = 0.0


@dataclass
class Verdict:
    """What became of a row."""

    name: str
    parts: list[Part] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    """Rows it reads that part too."""


# The grid


def parse(words: str) -> dict[str, list[str]]:
    """`"bank --a 1 2 --b"` as flags and their values, the positional ones under "".

    >>> parse("bank --a 1 2 --b")
    {'': ['bank'], 'a': ['1', '2'], 'b': []}
    """
    flags: dict[str, list[str]] = {}
    flag = ""
    for word in shlex.split(words):
        if word.startswith("--"):
            flag = word[2:]
            flags[flag] = []
        else:
            flags.setdefault(flag, []).append(word)
    return flags


def slug(words: dict[str, list[str]]) -> str:
    """A name for words: `mntp+mntp-steps=3`."""
    parts = []
    for flag, values in words.items():
        ends = ",".join(value.rstrip("/").rpartition("/")[2] for value in values)
        parts.append("=".join(filter(None, (flag, ends))))
    return re.sub(r"[^\w=+.,-]+", "_", "+".join(parts)).strip("_") or "base"


def make_rows(old: Fields, new: Fields, shared: Path, *, quick: bool) -> list[Row]:
    """Every row that both checkouts can run, each behind those it reads."""
    rows: dict[str, Row] = {}

    def add(verb: str, words: str, *, base: str | None = None, launch: str = "") -> str:
        flags = parse(words.replace("$S", str(shared)))
        name = f"{verb.replace(' ', '-')}/{'+'.join(filter(None, (launch, slug(flags))))}"
        full = {**parse(grid.USUAL[verb].replace("$S", str(shared))), **flags}
        if "out" in new[verb]:
            full["out"] = [name]
        if name not in rows or (base and not rows[name].base):
            rows[name] = Row(name=name, verb=verb, words=full, base=base, launch=launch)
        if verb in grid.BANK_VERBS:
            for tool, flag in (("export", {"out": [f"{name}@export"]}), ("info", {"json": []})):
                look = {"": [name], **flag}
                rows[f"{name}@{tool}"] = Row(
                    name=f"{name}@{tool}", verb=f"bank {tool}", words=look, launch=launch and "after"
                )
        return name

    for verb in new.keys() & old.keys() & grid.USUAL.keys():
        if quick and verb in grid.SLOW_VERBS:
            continue
        usual = add(verb, "")
        values = [v for entry in grid.GRID[verb].values() if not isinstance(entry, grid.Because) for v in listed(entry)]
        for value in [*values, *grid.EXTRA.get(verb, [])]:
            idle, tried = value.startswith("="), value.removeprefix("=")
            before, bar, flag = tried.partition("|")
            base = add(verb, before, base=usual) if bar else usual
            add(verb, f"{before} {flag}", base=None if idle else base)
        for launch, words in [] if quick else grid.OWN_PROCESS.get(verb, []):
            add(verb, words, launch=launch)
    for name, teacher in grid.ENCODED.items():
        pair = (name, teacher and teacher.replace("$S", str(shared)))
        rows[f"{name}@encode"] = Row(name=f"{name}@encode", verb="", words={"": [name]}, encode=pair)
    gone = {verb: set(names) for verb, names in {**grid.REMOVED, **grid.ADDED}.items()}
    runnable = {name: row for name, row in rows.items() if not row.fields & gone.get(row.verb, set())}
    return in_order({name: row for name, row in runnable.items() if all(n in runnable for n in needs(row, rows))})


def listed(entry: str | list[str]) -> list[str]:
    """An entry of the grid as a list."""
    return [entry] if isinstance(entry, str) else entry


def needs(row: Row, rows: dict[str, Row]) -> list[str]:
    """The rows whose output a row reads."""
    words = [word for flag, values in row.words.items() if flag != "out" for word in values]
    heads = {"/".join(word.split("/")[:2]) for word in words}
    return [head for head in sorted(heads) if head in rows and head != row.name]


def in_order(rows: dict[str, Row]) -> list[Row]:
    """The rows, each behind those it reads."""
    done: dict[str, Row] = {}

    def visit(row: Row) -> None:
        if row.name not in done:
            for name in needs(row, rows):
                visit(rows[name])
            done[row.name] = row

    for name in sorted(rows, key=lambda name: list(grid.USUAL).index(rows[name].verb) if rows[name].verb else 99):
        visit(rows[name])
    return list(done.values())


def chosen(rows: list[Row], only: list[str]) -> list[Row]:
    """The rows with one of the words in their names, what they read and what they are held against."""
    table = {row.name: row for row in rows}
    wanted: set[str] = set()
    todo = [row.name for row in rows if not only or any(word in row.name for word in only)]
    while todo:
        row = table[todo.pop()]
        if row.name not in wanted:
            wanted.add(row.name)
            looks = [f"{row.name}@{tool}" for tool in ("export", "info")]
            todo += [n for n in (*needs(row, table), row.base, *looks) if n in table]
    return [row for row in rows if row.name in wanted]


def check_fields(old: Fields, new: Fields) -> list[str]:
    """What the tables forget: fields without a row, fields of one checkout alone, defaults that differ."""
    wrong = []
    for verb in dict.fromkeys([*old, *new]):
        before, now, table = old.get(verb), new.get(verb), grid.GRID.get(verb, {})
        removed, added = grid.REMOVED.get(verb, {}), grid.ADDED.get(verb, {})
        if before is None or now is None:
            if "*" not in {**removed, **added}:
                wrong.append(
                    f"{verb}: only in the {'new' if before is None else 'old'} code; say why in ADDED or REMOVED"
                )
            continue
        names = grid.RENAMED.get(verb, {})
        before = {names.get(name, name): value for name, value in before.items()}
        wrong += [f"{verb} {name}: no row and no reason in GRID" for name in now if name not in table]
        wrong += [f"{verb} {name}: in GRID, but no field of it" for name in table if name not in {**now, **removed}]
        wrong += [f"{verb} {name}: gone, and not in REMOVED" for name in before if name not in {**now, **removed}]
        wrong += [f"{verb} {name}: new, and not in ADDED" for name in now if name not in {**before, **added}]
        wrong += [
            f"{verb} {name}: default was {before[name]}, is {value}"
            for name, value in now.items()
            if before.get(name, value) != value and not allowed(verb, f"default {name}")
        ]
    return wrong


# Running


@dataclass(frozen=True)
class Side:
    """One of the two checkouts and its folder of results."""

    name: str
    checkout: Path
    folder: Path

    def start(self, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run python with this checkout's package in the side's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"PYTHONPATH": str(self.checkout / "src"), "SAME_CHECKOUT": str(self.checkout)}
        settings |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        settings |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        command = [sys.executable, *words]
        environment = {**os.environ, **settings}
        return subprocess.run(command, cwd=self.folder, env=environment, text=True, check=False, **options)

    def fields(self) -> Fields:
        """Verb -> field -> default."""
        done = self.start([str(DRIVER), "fields"], capture_output=True)
        _, mark, table = done.stdout.rpartition("the fields:")
        if not mark:
            sys.exit(f"{self.name} code in {self.checkout} does not say its flags:\n{done.stdout}{done.stderr}")
        return json.loads(table)  # type: ignore[no-any-return]

    def run(self, rows: list[Row], shared: Path) -> dict[str, dict[str, Any]]:
        """Run the rows; a process that dies is begun again behind the row that killed it."""
        self.drive([row for row in rows if not row.launch], shared)
        for row in rows:
            if row.launch in ("torchrun", "compile"):
                self.run_alone(row)
        self.drive([row for row in rows if row.launch == "after"], shared)
        return self.results()

    def drive(self, waiting: list[Row], shared: Path) -> None:
        """Run rows in one process."""
        while waiting:
            plan = [
                {"name": r.name, "argv": None if r.encode else r.argv(old=self.old), "encode": r.encode}
                for r in waiting
            ]
            (self.folder / "rows.json").write_text(json.dumps({"rows": plan, "shared": str(shared)}))
            with (self.folder / "driver.txt").open("a") as log:
                done = self.start([str(DRIVER), "rows.json"], stdout=log, stderr=log)
            results = self.results()
            waiting = [row for row in waiting if row.name not in results]
            if waiting:
                self.note(waiting.pop(0).name, done.returncode or 1, f"its process died ({done.returncode})")

    def run_alone(self, row: Row) -> None:
        """Run a row in its own process, or in two."""
        torchrun = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m"]
        words = ["-m", *(torchrun if row.launch == "torchrun" else []), "llm2clip", *row.argv(old=self.old)]
        done = self.start(words, capture_output=True)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        named = [line for line in lines if "llm2clip: error" in line]
        self.note(row.name, done.returncode, (named or lines or [""])[-1], done.stdout)

    def note(self, name: str, code: int, stderr: str, stdout: str = "") -> None:
        """Add a result."""
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps({"name": name, "code": code, "stdout": stdout, "stderr": stderr}) + "\n")

    def results(self) -> dict[str, dict[str, Any]]:
        """Row -> exit code, what it printed, its last line on stderr."""
        path = self.folder / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {result["name"]: result for result in map(json.loads, lines)}

    @property
    def old(self) -> bool:
        """Whether it has the old names."""
        return self.name == "old"

    def plain(self, text: str) -> str:
        """Text without what is this side's alone: its folders."""
        return text.replace(str(self.folder), "FOLDER").replace(str(self.checkout), "CHECKOUT")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Comparing


def allowed(row: str, place: str) -> str | None:
    """Why the two may part at a place, if they may."""
    return next((why for rows, places, why in grid.ALLOWED if fnmatch(row, rows) and fnmatch(place, places)), None)


def compare_folders(old: Side, new: Side, name: str, verb: str, *, against: str | None = None) -> Iterator[Part]:
    """Where the folders of a row part; `against` compares with another row's folder."""
    a, b = old.folder / (against or name), new.folder / name
    files = sorted({str(p.relative_to(top)) for top in (a, b) for p in top.rglob("*") if p.is_file()}, key=first_logs)
    for file in files:
        if any(fnmatch(Path(file).name, pattern) for pattern in grid.LEFT_OUT):
            continue
        if verb in grid.BANK_VERBS and "/" in file + ("" if file in ("manifest.json", "run.json") else "/"):
            continue
        if not ((a / file).exists() and (b / file).exists()):
            yield Part(file, "only in the " + ("old" if (a / file).exists() else "new"))
            continue
        yield from compare_files(a / file, b / file, file, old=old, new=new, verb=verb)


def first_logs(file: str) -> tuple[int, str]:
    """Logs come first, then weights and vectors."""
    order = [".jsonl", ".safetensors", ".parquet", ".arrow"]
    suffix = Path(file).suffix
    return order.index(suffix) if suffix in order else len(order), file


def compare_files(a: Path, b: Path, file: str, *, old: Side, new: Side, verb: str) -> Iterator[Part]:
    """Where two files part."""
    if a.suffix in (".safetensors", ".parquet", ".arrow"):
        read = read_tensors if a.suffix == ".safetensors" else read_table
        yield from compare_tables(read(a), read(b), file)
        return
    try:
        before, now = old.plain(a.read_text()), new.plain(b.read_text())
    except UnicodeDecodeError:
        if a.read_bytes() != b.read_bytes():
            yield Part(file, "other bytes")
        return
    if a.suffix == ".json":
        yield from walk(tidy(json.loads(before), verb), tidy(json.loads(now), verb), file + " ")
    elif a.suffix == ".jsonl":
        steps = [[tidy(json.loads(line), verb) for line in text.splitlines()] for text in (before, now)]
        yield from walk_lines(*steps, file)
    else:
        yield from compare_text(before, now, file)


def compare_text(before: str, now: str, place: str) -> Iterator[Part]:
    """Where two texts part, but for times and dates."""
    a, b = (re.sub(grid.VOLATILE_TEXT, "#", text).splitlines() for text in (before, now))
    yield from walk(a, b, place + " line ")


def walk_lines(old: list[Any], new: list[Any], file: str) -> Iterator[Part]:
    """Where the lines of two logs part."""
    for i, (a, b) in enumerate(zip(old, new, strict=False)):
        step = f"step {a['step']}" if isinstance(a, dict) and "step" in a else f"line {i + 1}"
        yield from walk(a, b, f"{file} {step} ")
    if len(old) != len(new):
        yield Part(file, f"{len(old)} lines | {len(new)} lines")


def tidy(value: Any, verb: str) -> Any:
    """JSON in the new code's words, without what no two runs share."""
    names = {**grid.RENAMED.get(verb, {}), **grid.RENAMED_OUTPUT}
    gone = {*grid.REMOVED.get(verb, {}), *grid.ADDED.get(verb, {})}
    if isinstance(value, list):
        return [tidy(item, verb) for item in value]
    if isinstance(value, dict):
        kept = {names.get(key, key): tidy(item, verb) for key, item in value.items() if key not in grid.VOLATILE}
        for settings in (kept[key] for key in ("config", "settings") if isinstance(kept.get(key), dict)):
            for key in gone & settings.keys():
                del settings[key]
        return kept
    return value


def walk(old: Any, new: Any, place: str) -> Iterator[Part]:
    """Where two JSON values part."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if key not in old or key not in new:
                yield Part(f"{place}{key}", "only in the " + ("old" if key in old else "new"))
            else:
                yield from walk(old[key], new[key], f"{place}{key}/")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from walk(a, b, f"{place}{i}/")
    elif type(old) is not type(new) or (old != new and not old != old != new != new):
        numbers = isinstance(old, (int, float)) and isinstance(new, (int, float))
        distance = abs(float(old) - float(new)) if numbers else 0.0
        relative = distance / max(abs(float(old)), abs(float(new)), 1e-300) if numbers else 0.0
        text = f"{json.dumps(old)[:70]} | {json.dumps(new)[:70]}"
        yield Part(place.rstrip("/ "), text, distance, relative)


def read_tensors(path: Path) -> dict[str, Any]:
    """Name -> tensor."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_table(path: Path) -> dict[str, Any]:
    """Column -> tensor of its numbers, or a list."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_stream(path).read_all()
    vectors = [
        name
        for name, kind in zip(table.column_names, table.schema.types, strict=True)
        if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
    ]
    return {
        name: torch.tensor(table[name].to_pylist()) if name in vectors else table[name].to_pylist()
        for name in table.column_names
        if name not in grid.VOLATILE
    }


def compare_tables(old: dict[str, Any], new: dict[str, Any], file: str) -> Iterator[Part]:
    """Where named tensors (or columns of texts) part."""
    import torch

    for name in dict.fromkeys([*old, *new]):
        place = f"{file} {name}"
        if name not in old or name not in new:
            yield Part(place, "only in the " + ("old" if name in old else "new"))
        elif not (torch.is_tensor(old[name]) and torch.is_tensor(new[name])):
            yield from walk(old[name], new[name], f"{place} row ")
        elif (old[name].dtype, old[name].shape) != (new[name].dtype, new[name].shape):
            kinds = (f"{t.dtype} {list(t.shape)}" for t in (old[name], new[name]))
            yield Part(place, " | ".join(kinds))
        else:
            a, b = old[name].double(), new[name].double()
            distance = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
            if distance.any():
                relative = distance / torch.maximum(a.abs(), b.abs())
                yield Part(
                    place,
                    f"{distance.count_nonzero()} of {a.numel()} numbers",
                    float(distance.max()),
                    float(relative[distance > 0].max()),
                )


def judge(row: Row, old: Side, new: Side, results: list[dict[str, dict[str, Any]]]) -> Verdict:
    """Compare what both made of a row."""
    verdict = Verdict(row.name)
    before, now = (side.get(row.name, {"code": None, "stderr": "", "stdout": ""}) for side in results)
    if before["code"] != now["code"]:
        verdict.parts.append(Part("exit code", f"{before['code']} {before['stderr']} | {now['code']} {now['stderr']}"))
    elif before["code"] != 0:
        verdict.parts.append(Part("exit code", f"both fail ({now['code']}), so nothing is shown: {now['stderr']}"))
    parts = [*compare_text(old.plain(before["stdout"]), new.plain(now["stdout"]), "stdout")]
    parts += compare_folders(old, new, row.name, row.verb)
    for part in parts:
        why = allowed(row.name, part.place)
        if why is None:
            verdict.parts.append(part)
        else:
            verdict.allowed.append(f"{part.place}: {why}")
    if row.base and not verdict.parts and not has_effect(row, old, results[0]):
        verdict.parts.append(Part("effect", f"none: the same as {row.base}, so this row would not see the flag lost"))
    return verdict


def has_effect(row: Row, side: Side, results: dict[str, dict[str, Any]]) -> bool:
    """Whether the row's figures are others than its base's."""
    assert row.base
    tails = ["", "@export", "@info"] if row.verb in grid.BANK_VERBS else [""]
    for tail in tails:
        a, b = row.base + tail, row.name + tail
        if side.folder.joinpath(b).exists():
            for part in compare_folders(side, side, b, row.verb if not tail else "", against=a):
                if part.place.split(" ")[0] not in ("manifest.json", "run.json"):
                    return True
        said = [results[name]["stdout"].replace(name, "") for name in (a, b) if name in results]
        if len(said) == 2 and said[0] != said[1] and tail != "@info":
            return True
    return False


def show(verdict: Verdict, rows: dict[str, Row]) -> str:
    """The lines that are printed of a row that parts."""
    inputs = f"   (so do its inputs: {', '.join(verdict.inputs)})" if verdict.inputs else ""
    lines = [f"PARTS  {verdict.name}{inputs}", f"       {shlex.join(rows[verdict.name].argv(old=False))[:200]}"]
    files: dict[str, list[Part]] = {}
    for part in verdict.parts:
        files.setdefault(part.place.split(" ")[0], []).append(part)
    for parts in files.values():
        for part in parts[:SHOWN]:
            size = f"   (abs {part.absolute:.3g}, rel {part.relative:.3g})" if part.absolute else ""
            lines.append(f"       {part.place}: {part.text}{size}")
        if len(parts) > SHOWN:
            worst, most = max(parts, key=lambda p: p.absolute), max(parts, key=lambda p: p.relative)
            lines.append(
                f"       ... {len(parts)} places in all; largest abs {worst.absolute:.3g} ({worst.place}), "
                f"rel {most.relative:.3g} ({most.place})"
            )
    return "\n".join(lines)


def main() -> int:
    """Compare two checkouts; 0 if they are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="folder that holds the older src/llm2clip")
    parser.add_argument("--new", type=Path, default=ROOT, metavar="CHECKOUT", help="instead of this checkout")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows with a word in their name")
    parser.add_argument("--out", type=Path, help="new folder for all results; else a temporary one, kept if they part")
    parser.add_argument("--quick", action="store_true", help="without the demo and rows in processes of their own")
    args = parser.parse_args()
    start = time.monotonic()
    out = (args.out or Path(tempfile.mkdtemp(prefix="same-"))).resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {out} is not empty")
    from tools.same_shared import make_shared

    sides = [Side("old", args.old.resolve(), out / "old"), Side("new", args.new.resolve(), out / "new")]
    with ThreadPoolExecutor(3) as pool:
        making = pool.submit(make_shared, out / "shared")
        old_fields, new_fields = pool.map(Side.fields, sides)
        making.result()
        wrong = check_fields(old_fields, new_fields)
        rows = chosen(make_rows(old_fields, new_fields, out / "shared", quick=args.quick), args.only)
        say(f"{len(rows)} rows; made the models and data in {time.monotonic() - start:.0f} s")
        results = list(pool.map(lambda side: side.run(rows, out / "shared"), sides))
    say(f"ran them after {time.monotonic() - start:.0f} s")
    table = {row.name: row for row in rows}
    verdicts = {row.name: judge(row, *sides, results) for row in rows}
    parted = [verdict for verdict in verdicts.values() if verdict.parts]
    for verdict in parted:
        verdict.inputs = [name for name in needs(table[verdict.name], table) if verdicts[name].parts]
        say(show(verdict, table))
    for line in wrong:
        say(f"FIELD  {line}")
    report = {v.name: {"parts": [vars(p) for p in v.parts], "allowed": v.allowed} for v in verdicts.values()}
    (out / "same.json").write_text(json.dumps({"fields": wrong, "rows": report}, indent=1))
    excused = sum(bool(v.allowed) for v in verdicts.values())
    say(
        f"{len(rows)} rows: {len(rows) - len(parted)} equal ({excused} with differences that ALLOWED names), "
        f"{len(parted)} part; {len(wrong)} fields wrong; {time.monotonic() - start:.0f} s"
    )
    if not parted and not wrong and args.out is None:
        shutil.rmtree(out)
    else:
        say(f"everything is in {out} (same.json: every difference)")
    return int(bool(parted or wrong))


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
