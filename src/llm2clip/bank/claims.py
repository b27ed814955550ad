"""Which process works on what, when several fill one bank: a lock file for each task, free once its process is dead."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock

from llm2clip.artifacts import try_lock, unlock

CLAIMS = ".claims"


class Claims(contextlib.AbstractContextManager["Claims"]):
    """The tasks that this process holds, each by a file of its name in a hidden folder of the bank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / CLAIMS
        self._held: dict[str, BaseFileLock] = {}

    def take(self, task: str) -> bool:
        """Claim a task; returns False if somebody has it."""
        if lock := try_lock(self._folder / task):
            self._held[task] = lock
        return lock is not None

    def release(self, task: str) -> None:
        """Give a task back, done or not."""
        unlock(self._held.pop(task))

    @contextlib.contextmanager
    def hold(self, task: str) -> Iterator[None]:
        """Wait for a task that nobody needs for long, and hold it while the block runs."""
        while not self.take(task):
            time.sleep(0.1)
        try:
            yield
        finally:
            self.release(task)

    def __exit__(self, *error: object) -> None:
        """Give all back, and remove what killed processes left; the last to leave removes the folder."""
        for task in list(self._held):
            self.release(task)
        with contextlib.suppress(OSError):  # others are still at work
            for file in list(self._folder.glob("*")):
                if self.take(file.name):
                    self.release(file.name)
            self._folder.rmdir()
