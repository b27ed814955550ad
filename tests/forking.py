"""Children that share the loaded libraries: one is forked, does its work, and its end is waited for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

PATIENCE_SECONDS = 60.0


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child that shares the loaded libraries; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """The exit code of a child, or minus the signal that killed it; one that runs too long is killed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])
