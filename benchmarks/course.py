"""A course of parts in a given time: each in a process group of its own, its rows in a table as they come.

No part can hold up the course: one that is over its budget is killed with all it started, and the next begins. Table
and JSON are replaced whole after each row, so a course that is cut short, even by SIGKILL, leaves what it measured, and
says of each other part why it was not.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import line

TABLE, FIGURES, LOG = "table.md", "figures.json", "log.txt"
POLL_SECONDS = 0.1
OWN_END_SECONDS = 2.0
"""A part is told to be done this long before it is killed."""
KILL_SECONDS = 3.0
"""The longest wait for a killed process to be gone: one may hang in the driver."""
LEAST_SHARE = 0.5
"""A part is not begun with less than this share of its budget left."""
MOST_SHARE = 2.0
"""A part gets no more than this many times its budget, however much time there is."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command that appends rows to the file that its `--rows` names and would like to end within `--seconds`."""

    name: str
    command: tuple[str, ...]
    budget: float
    """Seconds."""
    about: str = ""
    """What it does and why it takes this long, for the plan."""
    needs: tuple[str, ...] = ()
    """Modules without which it is not begun."""


@dataclass
class Record:
    """What is known so far, in `folder` as a table for people and as JSON, replaced whole at each change."""

    folder: Path
    facts: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def plan(self, parts: Sequence[Part]) -> None:
        """Begin with all parts as not reached."""
        for part in parts:
            self.parts[part.name] = {"state": "not reached", "reason": "the run ended before it", "rows": []}
        self.write()

    def note(self, name: str, state: str, reason: str = "", seconds: float | None = None) -> None:
        """Say how a part went, or goes."""
        self.parts[name] |= {"state": state, "reason": reason, "seconds": seconds}
        self.write()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Add a row of a part."""
        rows = self.parts[name]["rows"]
        if row.get("replaces"):
            rows[:] = [other for other in rows if other["name"] != row["name"]]
        rows.append(row)
        self.write()

    def write(self) -> None:
        """Replace table and JSON."""
        _replace(self.folder / FIGURES, json.dumps({**self.facts, "parts": self.parts}, indent=2) + "\n")
        _replace(self.folder / TABLE, self.table())

    def table(self) -> str:
        """The rows, and what there is no row of."""
        lines = [", ".join(f"{name} {value}" for name, value in self.facts.items()), ""]
        lines += ["| part | what | value | ratio | against |", "|---|---|---|---|---|"]
        for name, part in self.parts.items():
            lines += [f"| {name} {line(row)}" for row in part["rows"]]
            if part["state"] != "done":
                lines.append(f"| {name} | {part['state']} | | | {part['reason'].replace('|', '/')} |")
        return "\n".join(lines) + "\n"


def run(
    parts: Sequence[Part],
    record: Record,
    *,
    deadline: float,
    cwd: Path,
    environment: Mapping[str, str],
) -> Iterator[str]:
    """Run the parts one after another until `deadline` (of `time.monotonic`); yields the name of each as it ends.

    Time that a part leaves goes to those after it, which keep their budgets in any case.
    """
    for number, part in enumerate(parts):
        left = deadline - time.monotonic()
        later = sum(other.budget for other in parts[number + 1 :])
        allowed = seconds_for(part.budget, left=left, later=later)
        missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
        if missing:
            record.note(part.name, "not measured", f"{', '.join(missing)} not installed")
        elif allowed < LEAST_SHARE * part.budget:
            record.note(part.name, "not measured", f"{max(left, 0):.0f} s were left of its {part.budget:.0f}")
        else:
            run_part(part, record, seconds=allowed, cwd=cwd, environment=environment)
        yield part.name


def seconds_for(budget: float, *, left: float, later: float) -> float:
    """How long a part may take: its budget, or more if the parts `later` leave more of the time `left`.

    >>> seconds_for(20, left=100, later=75), seconds_for(20, left=100, later=90), seconds_for(20, left=12, later=90)
    (25, 20, 12)
    """
    return min(MOST_SHARE * budget, left, max(budget, left - later))


def run_part(part: Part, record: Record, *, seconds: float, cwd: Path, environment: Mapping[str, str]) -> None:
    """Run one part for at most `seconds`, taking its rows as they come."""
    start = time.monotonic()
    record.note(part.name, "cut", "the run ended while it was at work")
    log_path = record.folder / LOG
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, log_path.open("ab") as log:
        log.write(f"\n===== {part.name}, at most {seconds:.0f} s\n".encode())
        log.flush()
        begin = log.tell()
        rows = RowsFile(Path(scratch) / "rows")
        command = [*part.command, "--rows", str(rows.path), "--seconds", f"{max(seconds - OWN_END_SECONDS, 1):.1f}"]
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment, "TMPDIR": scratch},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            while process.poll() is None and time.monotonic() - start < seconds:
                time.sleep(POLL_SECONDS)
                rows.move_to(record, part.name)
            code = process.poll()
        finally:  # a signal that ends the course passes through here, too
            kill_group(process)
            rows.move_to(record, part.name)
    took = time.monotonic() - start
    if code is None:
        record.note(part.name, "over budget", f"ended after {took:.0f} s", took)
    elif code:
        last = _last_line(log_path, begin)
        record.note(part.name, "failed", f"exit code {code}: {last}", took)
    else:
        record.note(part.name, "done", "", took)


class RowsFile:
    """A file to which a part appends rows as lines of JSON."""

    def __init__(self, path: Path) -> None:
        self.path, self.read = path, 0

    def move_to(self, record: Record, name: str) -> None:
        """Put the rows that are new into the record; a line that is not whole waits."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        for text in whole.splitlines():
            record.add(name, json.loads(text))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started, at once; what it leaves on the disk lies in a folder that goes, too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)


def _die_with_parent() -> None:
    """Let the kernel kill this process when the course is killed, so that nothing stays on the GPU."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_line(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((text.strip()[:300] for text in reversed(lines) if text.strip()), "it printed nothing")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
