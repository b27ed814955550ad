"""`pytest -m gpu` as a part of a course: a row that is up to date after each test, so that a cut run tells what passed.

`python -m benchmarks.tests --rows FILE [--seconds S]`; LLM2CLIP_TEST_GPUS and LLM2CLIP_TEST_DEVICE say where they run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rows import not_measured

ROOT = Path(__file__).resolve().parent.parent
NAME = "pytest -m gpu"
ON_CPU = "test_training.py"
"""What a CPU runs of them, to try the course."""
TEST_SECONDS = 40
"""Of one test, where pytest-timeout is installed: one that hangs must not take the time of the others."""


class Tally:
    """What became of the tests so far."""

    def __init__(self, rows: Path) -> None:
        self.rows, self.passed, self.skipped, self.failed = rows, 0, 0, list[str]()
        self.start = time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """After each phase of a test: set-up, call, clearing up."""
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1
        else:
            return
        self.write()

    def pytest_collectreport(self, report: Any) -> None:
        """A file of tests that cannot be opened."""
        if report.failed:
            self.failed.append(report.nodeid)
            self.write()

    def write(self) -> None:
        """Append the row of all so far, which takes the place of the one before."""
        notes = [f"{len(self.failed)} failed: {', '.join(self.failed)}"] if self.failed else []
        notes += [f"{self.skipped} skipped"] if self.skipped else []
        notes.append(f"{time.monotonic() - self.start:.0f} s")
        row = {"name": NAME, "value": self.passed, "unit": "passed", "against": "; ".join(notes), "replaces": True}
        append(self.rows, row)


def append(rows: Path, row: dict[str, Any]) -> None:
    """Append a row to the file of rows."""
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main() -> int:
    """Run the tests; the exit code is pytest's, but for no tests at all, which is 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tests", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, help="plays no part: tests that are not reached have no result")
    rows = parser.parse_args().rows
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if os.environ.get("LLM2CLIP_TEST_DEVICE") == "cpu":  # all of them would take minutes
        marked = [path for path in marked if path.endswith(ON_CPU)]
    if not marked:
        append(rows, not_measured(NAME, "there is no such test"))
        return 0
    options = ["-m", "gpu", "-v", "--durations=10", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        options += [f"--timeout={TEST_SECONDS}", "--timeout-method=signal"]
    return int(pytest.main([*options, *marked], plugins=[Tally(rows)]))


if __name__ == "__main__":
    sys.exit(main())
