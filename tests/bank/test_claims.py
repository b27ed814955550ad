"""Claims exclude other processes, and end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from llm2clip.bank.claims import CLAIMS, Claims


def take_elsewhere(folder: Path, task: int) -> bool:
    with get_context("fork").Pool(1) as pool:
        return pool.apply(_take, (folder, task))


def _take(folder: Path, task: int) -> bool:
    with Claims(folder) as claims:
        return claims.take(task)


def test_a_task_is_held_by_one_process(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        assert claims.take(3)
        assert not take_elsewhere(tmp_path, 3)
        assert take_elsewhere(tmp_path, 4)
        claims.release(3)
        assert take_elsewhere(tmp_path, 3)


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        Claims(tmp_path).take(3)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with Claims(tmp_path) as claims:
        assert claims.take(3)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with Claims(tmp_path) as claims:
        assert claims.take(3) and claims.take(4)
        claims.release(3)
    assert caplog.text.count("no file locks") == 1


def test_the_file_goes_when_all_is_done(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        assert (tmp_path / CLAIMS).exists()
        claims.remove_file()
    assert not (tmp_path / CLAIMS).exists()
