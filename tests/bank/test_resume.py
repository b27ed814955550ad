"""`kill -9` at any moment: the same command again ends in the same bytes, and repeats no shard but the one in hand."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankAddConfig, BankConfig
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.merge import add_to_bank
from llm2clip.bank.reader import Bank

NUM_MOMENTS = 20
ROWS = 16

Tick = Callable[[], None]


@contextmanager
def watched(tick: Tick, log: Path) -> Iterator[None]:
    """Calls `tick` before and after each write, flush, rename and encoded batch; logs the captions encoded."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (io, "open"), (shutil, "rmtree")):
            patch.setattr(owner, name, around(getattr(owner, name), tick))
        patch.setattr(CaptionEncoder, "_forward", around(CaptionEncoder._forward, tick))
        run = CaptionEncoder.run

        def logged(self, prepared, sink):
            with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w") as file:
                file.write(f"{sum(len(batch) for batch in prepared.batches)}\n")
            return run(self, prepared, sink)

        patch.setattr(CaptionEncoder, "run", logged)
        yield


def around(function, tick: Tick):
    def called(*arguments, **options):
        tick()
        result = function(*arguments, **options)
        tick()
        return result

    return called


def killed_after(moments: int) -> Tick:
    left = [moments]

    def tick() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


def run_and_die(work: Callable[[], object], moments: int, log: Path) -> None:
    """Run `work` in a child process that is killed at the given moment."""
    child = os.fork()
    if child == 0:
        try:
            with watched(killed_after(moments), log):
                work()
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def count_moments(work: Callable[[], object], log: Path) -> int:
    """How often `work` can be killed, counted where it will be: in a child of a process that has done it before."""
    child = os.fork()
    if child == 0:
        moments = [0]

        def tick() -> None:
            moments[0] += 1

        try:
            with watched(tick, log):
                work()
            log.with_name("moments").write_text(str(moments[0]))
            os._exit(0)
        finally:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == 0
    return int(log.with_name("moments").read_text())


@pytest.fixture(scope="module")
def unbroken(captions_csv: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory):
    """The command as a function of its --out, the folder of an unbroken run, and the moments at which it can die."""

    def command(out: Path) -> Path:
        settings = {"teacher": str(tiny_llm), "precision": "fp32", "shard_rows": ROWS, "device": "cpu"}
        return build_bank(BankConfig(data=(str(captions_csv),), out=out, batch_tokens=100, **settings))

    out = command(tmp_path_factory.mktemp("unbroken") / "bank")
    return command, out, count_moments(lambda: command(out.with_name("counted")), out.with_name("log"))


@pytest.mark.parametrize("moment", range(NUM_MOMENTS))
def test_killed_at(moment: int, unbroken, tmp_path: Path, files_of) -> None:
    command, out, moments = unbroken
    at = int((moment + np.random.default_rng(moment).random()) * moments / NUM_MOMENTS)
    check_kill(lambda: command(tmp_path / "bank"), at, tmp_path, files_of(out), files_of)


@pytest.mark.parametrize("before_end", range(1, 12, 2))
def test_killed_between_vectors_and_manifest(before_end: int, unbroken, tmp_path: Path, files_of) -> None:
    command, out, moments = unbroken
    check_kill(lambda: command(tmp_path / "bank"), moments - before_end, tmp_path, files_of(out), files_of)


def check_kill(command: Callable[[], Path], at: int, folder: Path, expected: dict[str, bytes], files_of) -> None:
    log = folder / "log"
    run_and_die(command, at, log)
    with watched(lambda: None, log):
        command()
    assert files_of(folder / "bank") == expected
    encoded = [int(line) for line in log.read_text().split()] if log.exists() else []
    rows = Bank.open(folder / "bank").num_rows
    assert rows <= sum(encoded) <= rows + ROWS


def test_killed_again_and_again(unbroken, tmp_path: Path, files_of) -> None:
    command, out, moments = unbroken
    log = tmp_path / "log"
    for at in (moments // 3, moments // 3, moments // 4):
        run_and_die(lambda: command(tmp_path / "bank"), at, log)
    command(tmp_path / "bank")
    assert files_of(tmp_path / "bank") == files_of(out)


@pytest.mark.parametrize("moment", range(4))
def test_adding_killed(moment: int, bank: Bank, write_captions, tmp_path: Path, files_of) -> None:
    data = write_captions(tmp_path / "data" / "new.csv", 40, columns={"raw": 6})

    def command(out: Path) -> Path:
        return add_to_bank(BankAddConfig(data=(str(data),), bank=bank.folder, out=out, device="cpu"))

    moments = count_moments(lambda: command(tmp_path / "whole"), tmp_path / "other-log")
    at = int((moment + 0.5) * moments / 4)
    run_and_die(lambda: command(tmp_path / "bank"), at, tmp_path / "log")
    command(tmp_path / "bank")
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "whole")
