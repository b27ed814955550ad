"""Mutated code imports this in place of mutmut's trampoline: it notes what forks and subprocesses of a test reach too.

mutmut itself keeps what a test reaches in memory, so that it loses what happens in another process.
"""

from __future__ import annotations

import os

from mutmut.mutation import trampoline
from mutmut.mutation.trampoline import MutantDict, wrap_in_trampoline

__all__ = ["MutantDict", "wrap_in_trampoline"]
FILE = "MUTATE_REACHED"  # where the notes go, one line "test<TAB>function"
FIXTURE = "MUTATE_FIXTURE"  # the shared fixture that is being made, if any

_noted: set[tuple[str, str]] = set()


def note(function: str, caller: str | None = None) -> None:
    """Write down that the test that runs now reached `function`, or that the shared fixture it needs did."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]  # "tests/test_x.py::test_y (call)"
    for reached_by in filter(None, (test, os.environ.get(FIXTURE))):
        if (reached_by, function) not in _noted:
            _noted.add((reached_by, function))
            with open(os.environ[FILE], "a", encoding="utf-8") as file:
                file.write(f"{reached_by}\t{function}\n")


trampoline.record_trampoline_hit = note
