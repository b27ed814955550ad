"""Does this checkout compute what an older one did? Both run one grid of commands; every figure is compared exactly.

`scripts/same OLD_CHECKOUT [--only WORD...] [--out DIR] [--quick] [--new CHECKOUT]`. `same_grid.py` has the tables,
`same_drive.py` runs rows with one checkout, `same_compare.py` compares what they left, `same_shared.py` makes the data.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tools import same_grid as grid
from tools.same_compare import Folders, Part, allowed, compare_printed, summary

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tools" / "same_drive.py"
Fields = dict[str, dict[str, str]]
"""Verb -> field of its config -> default as text."""
Results = dict[str, dict[str, Any]]
"""Row -> its exit code, stdout, and last line of stderr."""


@dataclass(frozen=True)
class Row:
    """One command: a verb, its flags (positional words under ""), and the row whose figures it must change."""

    name: str
    verb: str
    words: dict[str, list[str]]
    base: str | None = None
    launch: str = ""

    def argv(self, *, old: bool = False) -> list[str]:
        """What is typed behind `llm2clip`; the old code is given its own names of flags."""
        names = {new: before for before, new in grid.RENAMED.get(self.verb, {}).items()} if old else {}
        typed = self.verb.split()
        for flag, values in self.words.items():
            no = "no-" if flag.startswith("no-") else ""
            name = flag.removeprefix(no).replace("-", "_")
            typed += [f"--{no}{names.get(name, name).replace('_', '-')}"] if flag else []
            typed += values
        return typed

    def needs(self, rows: dict[str, Row]) -> list[str]:
        """The rows whose output it reads."""
        words = [word for flag, values in self.words.items() if flag != "out" for word in values]
        return sorted({"/".join(word.split("/")[:2]) for word in words} & rows.keys() - {self.name})


def parse(words: str) -> dict[str, list[str]]:
    """Flags and their values.

    >>> parse("bank --a 1 2 --b --a 3")
    {'': ['bank'], 'a': ['3'], 'b': []}
    """
    flags: dict[str, list[str]] = {}
    flag = ""
    for word in shlex.split(words):
        if word.startswith("--"):
            flag = word[2:]
            flags[flag] = []  # given twice, the later one counts
        else:
            flags.setdefault(flag, []).append(word)
    return flags


def slug(words: dict[str, list[str]]) -> str:
    """A name for flags, such as `ema=0.5+val-bank=base`."""
    ends = {flag: ",".join(value.rstrip("/").rpartition("/")[2] for value in words[flag]) for flag in words}
    parts = ["=".join(filter(None, pair)) for pair in ends.items()]
    return re.sub(r"[^\w=+.,-]+", "_", "+".join(parts)).strip("_") or "base"


class Grid:
    """Every row that both checkouts can run, by name."""

    def __init__(self, old: Fields, new: Fields, shared: Path, *, quick: bool) -> None:
        self.rows: dict[str, Row] = {}
        self.fields, self.shared = new, str(shared)
        for verb in [verb for verb in grid.USUAL if verb in old and verb in new]:
            if not (quick and verb in grid.SLOW_VERBS):
                self._add_verb(verb, alone=not quick)
        for name, teacher in grid.ENCODED.items():
            words = [name, teacher.replace("$S", self.shared), self.shared]
            self.rows[f"{name}@encode"] = Row(f"{name}@encode", "encode", {"": words, "out": [f"{name}@encode"]})
        gone = {**grid.REMOVED, **grid.ADDED}
        for name, row in list(self.rows.items()):
            flags = {flag.removeprefix("no-").replace("-", "_") for flag in row.words}
            if flags & set(gone.get(row.verb, ())):
                del self.rows[name]

    def _add_verb(self, verb: str, *, alone: bool) -> None:
        usual = self._add(verb, "")
        entries = [entry for entry in grid.GRID[verb].values() if not isinstance(entry, grid.Because)]
        values = [value for entry in entries for value in ([entry] if isinstance(entry, str) else entry)]
        for value in [*values, *grid.EXTRA.get(verb, [])]:
            before, bar, flag = value.removeprefix("=").partition("|")
            base = self._add(verb, before, base=usual) if bar else usual
            self._add(verb, f"{before} {flag}", base=None if value.startswith("=") else base)
        for launch, words in grid.OWN_PROCESS.get(verb, []) if alone else []:
            self._add(verb, words, launch=launch)

    def _add(self, verb: str, words: str, *, base: str | None = None, launch: str = "") -> str:
        usual, flags = (parse(text.replace("$S", self.shared)) for text in (grid.USUAL[verb], words))
        name = f"{verb.replace(' ', '-')}/{'+'.join(filter(None, (launch, slug(flags))))}"
        out = {"out": [name]} if "out" in self.fields[verb] else {}
        if not flags or name not in self.rows:
            base = None if base == name else base
            self.rows[name] = Row(name, verb, {**usual, **flags, **out}, base, launch)
        if verb in grid.BANK_VERBS:  # what is in it, past its format
            for tool, flag in {"export": {"out": [f"{name}@export"]}, "info": {"json": []}}.items():
                self.rows[f"{name}@{tool}"] = Row(f"{name}@{tool}", f"bank {tool}", {"": [name], **flag})
        return name

    def ordered(self, only: list[str]) -> list[Row]:
        """The rows with one of the words in their names and what those read, each row behind its inputs."""
        done: dict[str, Row] = {}

        def visit(name: str) -> None:
            if name in self.rows and name not in done:
                for needed in [*self.rows[name].needs(self.rows), self.rows[name].base or ""]:
                    visit(needed)
                done[name] = self.rows[name]
                for tool in ("export", "info"):
                    visit(f"{name}@{tool}")

        for name in self.rows:
            if not only or any(word in name for word in only):
                visit(name)
        # rows of own processes stand together, for few starts of the common one
        return sorted(done.values(), key=lambda row: bool(row.needs(done)) * 2 - 1 if row.launch else 0)


def check_fields(old: Fields, new: Fields) -> list[str]:
    """What the tables forget: fields without a row, fields of one checkout alone, defaults that differ."""
    wrong = []
    for verb in dict.fromkeys([*old, *new]):
        gone, names = {**grid.REMOVED.get(verb, {}), **grid.ADDED.get(verb, {})}, grid.RENAMED.get(verb, {})
        if verb not in old or verb not in new:
            side = "new" if verb in new else "old"
            wrong += [] if "*" in gone else [f"{verb}: only in the {side} code; say why in ADDED or REMOVED"]
            continue
        before, now = {names.get(name, name): value for name, value in old[verb].items()}, new[verb]
        rows = grid.GRID.get(verb, {})
        wrong += [f"{verb} {name}: no row and no reason in GRID" for name in now if name not in rows]
        wrong += [f"{verb} {name}: a row in GRID, but no such field" for name in rows if name not in {**now, **gone}]
        wrong += [f"{verb} {name}: gone, and not in REMOVED" for name in before if name not in {**now, **gone}]
        wrong += [f"{verb} {name}: new, and not in ADDED" for name in now if name not in {**before, **gone}]
        for name in before.keys() & now.keys():
            if before[name] != now[name] and not allowed(verb, f"default {name}"):
                wrong.append(f"{verb} {name}: the default was {before[name]}, is {now[name]}")
    return wrong


@dataclass(frozen=True)
class Side:
    """One of the two checkouts and its folder of results."""

    checkout: Path
    folder: Path
    old: bool

    def start(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """Run python with this checkout's package in the side's folder."""
        settings = {"PYTHONPATH": str(self.checkout / "src"), "SAME_CHECKOUT": str(self.checkout)}
        settings |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        settings |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command, environment = [sys.executable, *words], {**os.environ, **settings}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, errors="replace", check=False
        )

    def fields(self) -> Fields:
        """The flags of every verb, from the config classes."""
        done = self.start([str(DRIVER), "fields"])
        _, mark, table = done.stdout.rpartition("the fields:")
        if not mark:
            sys.exit(f"the code in {self.checkout} does not say its flags:\n{done.stdout}{done.stderr}")
        return json.loads(table)  # type: ignore[no-any-return]

    def run(self, rows: list[Row]) -> Results:
        """Run the rows that have no result yet, those without a launch in one process."""
        known = self.results()
        rows = [row for row in rows if row.name not in known]
        for row in rows:
            shutil.rmtree(self.folder / row.name, ignore_errors=True)  # of a run that was stopped
        for alone, group in groupby(rows, key=lambda row: bool(row.launch)):
            if not alone:
                self._run_together(list(group))
                continue
            for row in group:
                self._run_alone(row)
        return self.results()

    def _run_together(self, rows: list[Row]) -> None:
        """Rows in one process; if it dies, it is begun again behind the row that killed it."""
        while rows:
            plan = [{"name": row.name, "argv": row.argv(old=self.old)} for row in rows]
            (self.folder / "rows.json").write_text(json.dumps(plan))
            done = self.start([str(DRIVER), "rows.json"])
            rows = [row for row in rows if row.name not in self.results()]
            if rows:
                self._note(
                    rows.pop(0).name, done.returncode or 1, f"its process died ({done.returncode}): {done.stderr}"
                )

    def _run_alone(self, row: Row) -> None:
        """A row in its own process, or in two."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        two = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m"]
        done = self.start(["-m", *(two if row.launch == "torchrun" else []), "llm2clip", *row.argv(old=self.old)])
        self._note(row.name, done.returncode, done.stderr, done.stdout)

    def _note(self, name: str, code: int, stderr: str, stdout: str = "") -> None:
        lines = [line for line in stderr.splitlines() if line.strip()]
        said = ([line for line in lines if "llm2clip: error" in line] or lines or [""])[-1]
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps({"name": name, "code": code, "stdout": stdout, "stderr": said}) + "\n")

    def results(self) -> Results:
        """What is known of the rows that have run."""
        path = self.folder / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {result["name"]: result for result in map(json.loads, lines)}


def judge(row: Row, folders: Folders, old: Results, new: Results) -> list[Part]:
    """Where the two part in a row, or why the row shows nothing."""
    before, now = old[row.name], new[row.name]
    parts = []
    if before["code"] or now["code"]:
        both = "both fail, so nothing is shown: " if before["code"] == now["code"] else ""
        said = f"{both}{before['code']} {before['stderr']} | {now['code']} {now['stderr']}"
        parts.append(Part("exit code", said))
    parts += compare_printed(*folders.plain(before["stdout"], now["stdout"]), row.verb)
    parts += folders.compare(row.name, row.name, row.verb)
    if row.base and not parts and not has_effect(row, folders, old):
        parts.append(Part("effect", f"none: all is as in {row.base}, so the row would not see its flag lost"))
    return parts


def has_effect(row: Row, folders: Folders, old: Results) -> bool:
    """Whether the row's figures are others than its base's, in the old code."""
    only_old = Folders(folders.old, folders.old)
    for tail, verb in (("", row.verb), ("@export", "bank export")):
        parts = only_old.compare(f"{row.base}{tail}", f"{row.name}{tail}", verb)
        if any(is_result(part) for part in parts):
            return True
    printed = [old[name]["stdout"].replace(name, "") for name in (row.base or "", row.name)]
    return printed[0] != printed[1]


def is_result(part: Part) -> bool:
    """Whether a place tells what was computed, not what was asked for."""
    key = part.place.partition(" ")[2]
    asked = key.startswith(("config", "files")) or "fingerprint" in key
    return part.file != "run.json" and not (part.file == "manifest.json" and asked)


def main() -> int:
    """Compare two checkouts; 0 if they are the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="folder that holds the older src/llm2clip")
    parser.add_argument("--new", type=Path, default=ROOT, metavar="CHECKOUT", help="instead of this checkout")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows with a word in their names")
    parser.add_argument("--out", type=Path, help="folder for all results; those of the old code there are used again")
    parser.add_argument("--quick", action="store_true", help="without the demo and rows in processes of their own")
    args = parser.parse_args()
    out = (args.out or Path(tempfile.mkdtemp(prefix="same-"))).resolve()
    whose = out / "old" / "checkout.txt"
    if out.exists() and any(out.iterdir()) and (not whose.exists() or whose.read_text() != str(args.old.resolve())):
        parser.error(f"--out {out} holds something else than results of {args.old}")
    shutil.rmtree(out / "new", ignore_errors=True)
    from tools.same_shared import make_shared

    start = time.monotonic()
    sides = [Side(args.old.resolve(), out / "old", old=True), Side(args.new.resolve(), out / "new", old=False)]
    for side in sides:
        side.folder.mkdir(parents=True, exist_ok=True)
    whose.write_text(str(args.old.resolve()))
    with ThreadPoolExecutor() as pool:
        making = pool.submit(make_shared, out / "shared")
        fields = list(pool.map(Side.fields, sides))
        making.result()
        wrong = check_fields(*fields)
        rows = Grid(*fields, out / "shared", quick=args.quick).ordered(args.only)
        results = list(pool.map(lambda side: side.run(rows), sides))
    folders = Folders(*((side.folder, side.checkout) for side in sides))
    table, parted, excused = {row.name: row for row in rows}, {}, {}
    for row in rows:
        parts = judge(row, folders, *results)
        excused[row.name] = {part.place: why for part in parts if (why := allowed(row.name, part.place))}
        if kept := [part for part in parts if part.place not in excused[row.name]]:
            parted[row.name] = kept
            inputs = [name for name in row.needs(table) if name in parted]
            say(f"PARTS  {row.name}{'   as does its input ' + ', '.join(inputs) if inputs else ''}")
            say(f"       llm2clip {shlex.join(row.argv())[:180]}\n{summary(kept)}")
    for line in wrong:
        say(f"FIELD  {line}")
    differences = {name: [part._asdict() for part in parts] for name, parts in parted.items()}
    (out / "same.json").write_text(json.dumps({"fields": wrong, "parted": differences, "allowed": excused}, indent=1))
    number = sum(map(bool, excused.values()))
    say(
        f"{len(rows)} rows: {len(rows) - len(parted)} equal, {len(parted)} part ({number} part where ALLOWED says so); "
        f"{len(wrong)} fields wrong; {time.monotonic() - start:.0f} s"
    )
    if parted or wrong or args.out:
        say(f"all results are in {out}, every difference in same.json")
    else:
        shutil.rmtree(out)
    return int(bool(parted or wrong))


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
