"""Claims exclude other processes, and end with the process that holds them."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from llm2clip.bank.claims import CLAIMS, Claims


def take_elsewhere(folder: Path, task: str) -> bool:
    with get_context("fork").Pool(1) as pool:
        return pool.apply(_take, (folder, task))


def _take(folder: Path, task: str) -> bool:
    with Claims(folder) as claims:
        return claims.take(task)


def test_a_task_is_held_by_one_process(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        assert claims.take("a")
        assert not take_elsewhere(tmp_path, "a")
        assert take_elsewhere(tmp_path, "b")
        claims.release("a")
        assert take_elsewhere(tmp_path, "a")


def test_a_thread_may_take_what_another_gives_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(claims.take, "a").result()
        assert not take_elsewhere(tmp_path, "a")
        claims.release("a")
        assert not list((tmp_path / CLAIMS).iterdir())
        assert take_elsewhere(tmp_path, "a")


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        claims = Claims(tmp_path)
        claims.take("a")
        claims.take("b")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert sorted(path.name for path in (tmp_path / CLAIMS).iterdir()) == ["a", "b"]
    with Claims(tmp_path) as claims:
        assert claims.take("a")
    assert not list(tmp_path.iterdir()), "nor does its file stay, claimed again or not"


def test_all_goes_with_the_last(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        claims.take("a")
        assert take_elsewhere(tmp_path, "b")
        assert [path.name for path in (tmp_path / CLAIMS).iterdir()] == ["a"]
    assert not (tmp_path / CLAIMS).exists()
