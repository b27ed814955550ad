"""Which slips do the tests notice? Scores modules by mutants: one small change each, killed if a test fails of it.

    scripts/mutate                                  # every module of tools/mutate.toml
    scripts/mutate student/loss.py metrics.py
    scripts/mutate --sample 60 student/session.py   # 60 of its mutants, drawn by --seed
    scripts/mutate --survivors student/loss.py      # after new tests: only those that survived, the killed stay killed
    scripts/mutate --show student/loss.py           # what survived, as diffs

A run that was killed goes on where it stopped; with other code or tests it begins anew. The table goes to
docs/mutation.md; survivors that no test can tell from the code are listed in tools/equivalent.toml with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOOLS = Path(__file__).parent
ROOT = Path.cwd()
TABLE, EQUIVALENT, PAGE = Path("tools/mutate.toml"), Path("tools/equivalent.toml"), Path("docs/mutation.md")
WORK = ROOT / "out" / "mutants"
SETTINGS = {
    "source_paths": ["src"],
    "also_copy": ["docs"],  # tests read it
    "process_isolation": "forkserver",  # torch refuses backward in a fork of a process that has done one
    "pytest_add_cli_args": ["-p", "no:cacheprovider"],
    "do_not_mutate_patterns": [r"^\s*raise\b", r"\blogger\.", r"\bwarnings\.warn\("],  # the wording of messages
    "timeout_constant": 15.0,  # a mutant has multiplier * (constant + what its tests took in all), half of it of CPU
    "timeout_multiplier": 4.0,
    "track_dependencies": False,
    "use_git_change_detection": False,
    "on_dependency_change": "ignore",  # stamp.json sees to that
    "use_setproctitle": False,
}
KILLED, TIMEOUT, SURVIVED, UNREACHED = (1, 3), (36,), (0,), (5, 33)


@dataclass
class Verdicts:
    """What became of a module's mutants; names by verdict."""

    module: str
    killed: list[str] = field(default_factory=list)
    timeout: list[str] = field(default_factory=list)
    survived: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    equivalent: list[str] = field(default_factory=list)
    idle: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)  # entries of equivalent.toml that fit none
    unsure: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)

    def row(self, *, of: int) -> str:
        """Its line of the table; what no test reached has survived, what took too long was noticed."""
        killed, survived = len(self.killed) + len(self.timeout), len(self.survived) + len(self.unreached)
        score = f"{killed / (killed + survived):.2f}" if killed + survived else "-"
        number = killed + survived + len(self.equivalent)
        mutants = f"{number} of {of}" if number < of else f"{number}"
        cells = [f"`{self.module}`", mutants, killed, len(self.timeout), survived, len(self.unreached)]
        cells += [len(self.equivalent), score, datetime.date.today()]
        return "| " + " | ".join(map(str, cells)) + " |"


def digest(paths: Iterable[Path], *more: object) -> str:
    """SHA-256 of files and their names, and of `more`."""
    total = hashlib.sha256(repr(more).encode())
    for path in sorted(paths):
        total.update(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


class Module:
    """One line of the table: a source file, its tests and its folder of work."""

    def __init__(self, name: str, table: dict[str, Any]) -> None:
        if name not in table["tests"]:
            raise SystemExit(f"mutate: {name} is not in {TABLE}; it has {', '.join(table['tests'])}")
        self.name = name
        self.source = Path(table["package"], name)
        self.tests = sorted({path for pattern in table["tests"][name] for path in Path("tests").glob(pattern)})
        self.settings = table.get("settings", {})
        self.folder = WORK / name.removesuffix(".py").replace("/", "-")
        if not self.source.is_file() or not self.tests:
            raise SystemExit(f"mutate: {self.source} or its tests {table['tests'][name]} do not exist; edit {TABLE}")

    def prepare(self, *, sample: int, seed: int, survivors: bool) -> None:
        """Make the folder that mutmut runs in, or keep it if its verdicts are of this code and these tests."""
        everything = [p for folder in ("src", "tests", "tools") for p in Path(folder).rglob("*.py")]
        options = (sample, seed, importlib.metadata.version("mutmut"))
        now = {
            "module": digest([self.source, *TOOLS.glob("*.py")], *options),
            "rest": digest([*everything, Path("pyproject.toml")], self.tests),
        }
        before = {}
        with contextlib.suppress(FileNotFoundError):
            before = json.loads((self.folder / "stamp.json").read_text())
        if before != now:
            (self.folder / "stamp.json").unlink(missing_ok=True)  # until the tests of the new code have passed
            if survivors and before.get("module") == now["module"]:
                self.forget({*SURVIVED, *UNREACHED, *TIMEOUT, 35})
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "mutants" / "src").mkdir(parents=True, exist_ok=True)  # Python forgets a path that is not there
        (self.folder / "stamp-new.json").write_text(json.dumps(now))
        for place in ("src", "tests", "docs"):
            with contextlib.suppress(FileExistsError):
                (self.folder / place).symlink_to(ROOT / place)
        shutil.rmtree(self.folder / "mutants" / "tests", ignore_errors=True)
        settings = {
            **SETTINGS,
            **self.settings,
            "only_mutate": [str(self.source)],
            "pytest_add_cli_args_test_selection": list(map(str, self.tests)),
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        text = Path("pyproject.toml").read_text(encoding="utf-8")
        (self.folder / "pyproject.toml").write_text("\n".join([text, "[tool.mutmut]", *lines, ""]), encoding="utf-8")

    @property
    def meta(self) -> Path:
        """Where mutmut keeps the verdicts."""
        return self.folder / "mutants" / f"{self.source}.meta"

    def forget(self, codes: set[int]) -> None:
        """Drop the verdicts `codes`, and what mutmut knows of the tests."""
        meta = json.loads(self.meta.read_text())
        meta["exit_code_by_key"] = {k: None if v in codes else v for k, v in meta["exit_code_by_key"].items()}
        self.meta.write_text(json.dumps(meta))
        (self.folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)

    def run(self, *, processes: int, sample: int, seed: int) -> None:
        """Give every mutant that has none a verdict."""
        paths = [str(self.folder / "mutants" / "src"), str(TOOLS.resolve()), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),  # for the Pythons that tests start
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, str(TOOLS.resolve() / "mutating.py"), str(processes), str(sample), str(seed)]
        if subprocess.run(command, cwd=self.folder, env=environment, check=False).returncode:
            output = self.folder / "output.txt"
            said = f"; the tests said:\n{output.read_text()[-3000:]}" if output.is_file() else ""
            raise SystemExit(f"mutate: the run of {self.name} stopped in {self.folder}{said}")

    def diff(self, mutant: str) -> tuple[str, str]:
        """Name of the mutant's function and the diff that makes it."""
        from mutmut.mutation.diff_apply import get_diff_for_mutant
        from mutmut.utils.file_utils import change_cwd
        from mutmut.utils.format_utils import orig_function_and_class_names_from_key

        with change_cwd(self.folder):
            text = get_diff_for_mutant(mutant, path=self.source)
        function, owner = orig_function_and_class_names_from_key(mutant)
        return f"{owner}.{function}" if owner else function, text

    def verdicts(self, equivalents: list[dict[str, str]]) -> Verdicts:
        """The verdicts so far."""
        known = [(e["function"], changed(e["diff"])) for e in equivalents if e["module"] == self.name]
        found = Verdicts(self.name)
        if not self.meta.is_file():
            raise SystemExit(f"mutate: {self.name} has not been run here; type scripts/mutate {self.name}")
        codes = json.loads(self.meta.read_text())["exit_code_by_key"]
        for mutant, code in codes.items():
            for codes_of, names in (
                (KILLED, found.killed),
                (TIMEOUT, found.timeout),
                (SURVIVED, found.survived),
                (UNREACHED, found.unreached),
                ((None,), found.pending),
            ):
                if code in codes_of:
                    names.append(mutant)
                    break
            else:
                found.unsure.append(mutant)
        for names in (found.survived, found.unreached):
            for mutant in list(names):
                function, diff = self.diff(mutant)
                if (function, changed(diff)) in known:
                    known.remove((function, changed(diff)))  # an entry stands for one mutant
                    names.remove(mutant)
                    found.equivalent.append(mutant)
        found.idle = known
        return found


def changed(diff: str) -> tuple[str, ...]:
    """The lines that a diff takes away and puts in, without their indentation."""
    lines = [line for line in diff.strip().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return tuple(f"{line[0]} {line[1:].strip()}" for line in lines)


PAGE_TEXT = """\
# Mutation scores

`scripts/mutate` changes one thing of a module at a time (an operator, a constant, an argument, a condition, a call that
is dropped) and runs the tests that reach it, of the files that `tools/mutate.toml` names. Score: mutants that a test
fails of or runs out of time with, in all that are not judged equivalent. "Unreached" ones, which no test runs at all,
are among those that survived. The wording of errors and of the log is not changed.

| module | mutants | killed | of these by time | survived | of these unreached | equivalent | score | date |
|---|---|---|---|---|---|---|---|---|
{rows}

## Judged equivalent

No test can tell these from the code as it is, or none should; they are left out of the scores. Kept in
`tools/equivalent.toml`.
{equivalents}"""


def write_page(row: str, table: dict[str, Any], equivalents: list[dict[str, str]]) -> None:
    """Put a module's row in the page; rows of the others stay."""
    old = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    rows = {line.split("`")[1]: line for line in [*old, row] if line.startswith("| `")}
    entries = []
    for e in equivalents:
        lines = "\n".join(changed(e["diff"]))
        entries.append(f"\n`{e['module']}`, `{e['function']}`: {e['reason']}\n\n```diff\n{lines}\n```\n")
    text = PAGE_TEXT.format(
        rows="\n".join(rows[name] for name in table["tests"] if name in rows),
        equivalents="".join(entries) or "\nNone so far.\n",
    )
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Score modules one after the other, or show what survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="as in tools/mutate.toml (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: cores)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="mutants a module (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--survivors", action="store_true", help="of a run before other tests: those that survived it")
    parser.add_argument("--show", action="store_true", help="print the survivors of the last run, run nothing")
    arguments = parser.parse_args()
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    equivalents = []
    if EQUIVALENT.is_file():
        equivalents = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("equivalent", [])
    for module in [Module(name, table) for name in arguments.modules or table["tests"]]:
        draw = {"sample": arguments.sample, "seed": arguments.seed}
        if not arguments.show:
            module.prepare(**draw, survivors=arguments.survivors)
            module.run(**draw, processes=arguments.processes)
        found = module.verdicts(equivalents)
        if arguments.show:
            show(module, found)
            continue
        row = found.row(of=int((module.folder / "total.txt").read_text()))
        print(row)
        if found.unsure or found.pending:
            print(f"no verdict on {', '.join(found.unsure + found.pending)}: run again")
        if found.idle and not arguments.sample:
            print(f"no survivor fits these of {EQUIVALENT}: {found.idle}")
        write_page(row, table, equivalents)


def show(module: Module, found: Verdicts) -> None:
    """Print survivors as diffs, ready for tools/equivalent.toml where they are judged so."""
    for mutant in found.survived + found.unreached:
        function, diff = module.diff(mutant)
        reached = ", reached by no test" if mutant in found.unreached else ""
        print(f"# {module.name} {function}: {mutant.rpartition('.')[2]}{reached}\n{diff}\n")


if __name__ == "__main__":
    main()
