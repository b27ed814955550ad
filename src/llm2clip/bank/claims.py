"""Which process works on what, when several fill one bank: record locks that the system frees when a process dies.

One hidden file in the bank's folder is locked byte by byte: a byte for each task. Such locks work across machines on
NFS, Lustre and GPFS. On a file system without them each process goes on unlocked: then two may encode the same shard,
which costs time and nothing else, because every file appears whole, by a rename, with the same content, under a
temporary name of its own that no other process removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from llm2clip.artifacts import NO_LOCKS

logger = logging.getLogger("llm2clip")
CLAIMS = ".claims"
TABLE_TASK, TEACHER_TASK, FINISH_TASK, FIRST_SHARD_TASK = 0, 1, 2, 3


class Claims:
    """The tasks that this process holds; all are free again when it ends, however it ends.

    Attributes:
        supported: False once the file system has shown that it has no locks: then a claim excludes nobody.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Claims(Path(folder)) as claims:
        ...     claims.take(3)
        True
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / CLAIMS
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.supported = True

    def take(self, task: int) -> bool:
        """Claim a task; returns False if another process has it."""
        if not self.supported:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, task)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                "no file locks in %s (%s): two processes may encode the same shard", self._path.parent, error
            )
            self.supported = False
        return True

    def release(self, task: int) -> None:
        """Give a task back, done or not."""
        if self.supported:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, task)

    @contextlib.contextmanager
    def hold(self, task: int) -> Iterator[None]:
        """Wait for a task that nobody needs for long, and hold it while the block runs."""
        while not self.take(task):
            time.sleep(0.1)
        try:
            yield
        finally:
            self.release(task)

    def remove_file(self) -> None:
        """Tidy up, once there is nothing left to claim."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
