"""A file system without locks: processes that overtake each other do no harm and take none."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankAddConfig, BankConfig
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.merge import add_to_bank
from llm2clip.bank.reader import Bank

Files = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as some network ones are."""

    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(fcntl, "lockf", unsupported)


@pytest.fixture
def config(captions_csv: Path, tiny_llm: Path, tmp_path: Path) -> BankConfig:
    """A bank of two shards."""
    settings = {"teacher": str(tiny_llm), "precision": "fp32", "shard_rows": 64, "device": "cpu"}
    return BankConfig(data=(str(captions_csv),), out=tmp_path / "bank", **settings)


def overtaken(work: Callable[[], object], moment: int) -> int:
    """Run `work`; at one of its moments another process does the whole of it. Returns how many moments there were.

    A moment is just before a file is flushed, renamed or removed, or captions are encoded.
    """
    seen, other_runs = 0, False

    def tick() -> None:
        nonlocal seen, other_runs
        if other_runs:
            return
        seen += 1
        if seen - 1 == moment:
            other_runs = True
            work()
            other_runs = False

    def before(function):
        def called(*arguments, **options):
            tick()
            return function(*arguments, **options)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "link"), (shutil, "rmtree"), (CaptionEncoder, "run")):
            patch.setattr(owner, name, before(getattr(owner, name)))
        work()
    return seen


EVERY = [5, pytest.param(1, marks=pytest.mark.slow)]
"""Moments from one that is tried to the next."""


def check_overtaken(work: Callable[[], object], out: Path, every: int, files_of: Files) -> None:
    moments = overtaken(work, -1)
    expected = files_of(out)
    assert moments > 20 and not [name for name in expected if Path(name).name.startswith(".")]
    for moment in range(0, moments, every):
        shutil.rmtree(out)
        overtaken(work, moment)
        assert files_of(out) == expected, moment


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("every", EVERY)
def test_overtaken_without_locks(every: int, config: BankConfig, files_of: Files) -> None:
    check_overtaken(lambda: build_bank(config), config.out, every, files_of)


@pytest.mark.ci
@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("every", EVERY)
def test_overtaken_while_adding_without_locks(
    every: int, bank: Bank, write_captions, tmp_path: Path, files_of: Files
) -> None:
    data = write_captions(tmp_path / "data" / "new.csv", 10, columns={"raw": 6})
    config = BankAddConfig(data=(str(data),), bank=bank.folder, out=tmp_path / "more", device="cpu")
    check_overtaken(lambda: add_to_bank(config), config.out, every, files_of)


@pytest.mark.usefixtures("no_locks")
def test_a_shard_that_another_process_made_stays_its_own(config: BankConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written again it would be the same but for rounding, as of other hardware; its checksum is in the manifest."""
    run, made = CaptionEncoder.run, []

    def slow(self, prepared, sink):
        monkeypatch.setattr(CaptionEncoder, "run", run)
        build_bank(config)
        made.append((config.out / "vectors" / "00000.npy").stat().st_ino)
        return run(self, prepared, sink)

    monkeypatch.setattr(CaptionEncoder, "run", slow)
    build_bank(config)
    assert made == [(config.out / "vectors" / "00000.npy").stat().st_ino]


LEFTOVERS = ("vectors/.00000.npy.0123abcd.tmp", ".table.0123abcd.tmp/text.npy")


@pytest.fixture
def half_written(config: BankConfig) -> list[Path]:
    """What two other processes have half written in the folder, or left so when they were killed."""
    build_bank(dataclasses.replace(config, shard="0/2"))
    files = [config.out / name for name in LEFTOVERS]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    return files


def test_what_killed_processes_left_goes(config: BankConfig, half_written: list[Path]) -> None:
    build_bank(config)
    assert not list(config.out.rglob(".*"))


@pytest.mark.usefixtures("no_locks")
def test_without_locks_it_may_be_a_slower_process_and_stays(
    config: BankConfig, half_written: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    build_bank(config)
    assert all(file.exists() for file in half_written)
    assert "it holds 2 unfinished files of other processes" in caplog.text
