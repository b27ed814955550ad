"""Forked processes: side by side as under torchrun, or killed at a chosen moment (the n-th call in a function)."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die_within(owner: Any, name: str, *, entry: int = 1, calls: int = 1) -> None:
    """Have this process killed at the `calls`-th call within `owner.name`, counted from its `entry`-th entry on."""
    entries, left = 0, calls

    def hook(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= event in ("call", "c_call")
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_entry() -> Any:
        nonlocal entries
        entries += 1
        return hook if entries >= entry else None

    setattr(owner, name, _profiled(getattr(owner, name), on_entry))


def counting(function: Any, counts: list[int]) -> Any:
    """`function`, which adds the number of calls within it to `counts` each time it is entered."""

    def hook(frame: Any, event: str, argument: Any) -> None:
        counts[-1] += event in ("call", "c_call")

    def on_entry() -> Any:
        counts.append(0)
        return hook

    return _profiled(function, on_entry)


def _profiled(function: Any, on_entry: Callable[[], Any]) -> Any:
    @functools.wraps(function)
    def profiled(*args: Any, **kwargs: Any) -> Any:
        before = sys.getprofile()  # of a function around this one
        sys.setprofile(on_entry())
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(before)

    return profiled


def in_child(work: Callable[[], Any]) -> tuple[int, str]:
    """Do `work` in a forked process; how it ended (0, an exit code, or minus the signal) and the error it raised."""
    return _ended(*_fork(work))


def side_by_side(number: int, meeting: Path, work: Callable[[int], Any]) -> list[tuple[int, str]]:
    """Do `work`, given its rank, in forked processes that see each other as those of torchrun do, on the CPU.

    Args:
        meeting: a file that is not there yet.

    Returns:
        How each ended, as `in_child` says it.
    """
    children = [_fork(functools.partial(_join, rank, number, meeting, work)) for rank in range(number)]
    return [_ended(*child) for child in children]


def _join(rank: int, number: int, meeting: Path, work: Callable[[int], Any]) -> None:
    import torch
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, if it trained
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)})
    os.environ.update({"LOCAL_WORLD_SIZE": str(number), "ACCELERATE_USE_CPU": "true"})
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=number)
    work(rank)


def _fork(work: Callable[[], Any]) -> tuple[int, int]:
    """A process that does `work`, and the pipe by which it tells its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            failed = sys.exc_info()[0] is not None
            os.write(writing, traceback.format_exc()[-4000:].encode() if failed else b"")
            os._exit(failed)
    os.close(writing)
    return child, reading


def _ended(child: int, reading: int) -> tuple[int, str]:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.set_blocking(reading, False)  # processes of the child's own, which may outlive it, hold the pipe open too
    error = b""
    with contextlib.suppress(BlockingIOError):
        error = os.read(reading, 5000)
    os.close(reading)
    return status, error.decode(errors="replace")
