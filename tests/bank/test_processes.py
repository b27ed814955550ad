"""Several processes on one folder, as parts or by rank: killed, late, failing, under torchrun; the bytes of one."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm2clip.artifacts import is_complete
from llm2clip.bank import fill as fill_module
from llm2clip.bank.build import build_bank
from llm2clip.bank.claims import CLAIMS, Claims
from llm2clip.bank.config import BankAddConfig, BankConfig
from llm2clip.bank.merge import add_to_bank
from llm2clip.bank.reader import Bank
from llm2clip.bank.vectors import ShardBuffer

from ..forking import PATIENCE_SECONDS, end_of, fork

Files = Callable[[Path], dict[str, bytes]]
"""A test that waits longer for another process has found that it never comes."""


@pytest.fixture
def config(captions_csv: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BankConfig:
    """The command that made `bank`, for another folder; who waits for others looks often."""
    monkeypatch.setattr(fill_module, "WAIT_SECONDS", 0.05)
    settings = {"teacher": str(tiny_llm), "precision": "fp32", "shard_rows": 16, "device": "cpu"}
    return BankConfig(data=(str(captions_csv),), out=tmp_path / "bank", **settings)


def by_part(config: BankConfig, number: int) -> None:
    """The `number`-th of three jobs that each make their own shards."""
    build_bank(dataclasses.replace(config, shard=f"{number}/3"))


def by_rank(config: BankConfig, number: int) -> None:
    """The `number`-th of three processes that make whatever nobody else is making."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(number))
        patch.setenv("WORLD_SIZE", "3")
        build_bank(config)


def wait_for(file: Path, *, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_parts_by_hand_make_the_same_bank(bank: Bank, config: BankConfig, encoded: list[int], files_of: Files) -> None:
    for part, counts in ((1, [16, 16, 8]), (2, [16, 16]), (0, [16, 16, 16])):
        encoded.clear()
        by_part(config, part)
        assert is_complete(config.out) == (part == 0)
        assert encoded == counts
    assert files_of(config.out) == files_of(bank.folder)


@pytest.mark.parametrize("work", [by_part, by_rank])
def test_three_processes_share_the_work(work, bank: Bank, config: BankConfig, files_of: Files) -> None:
    children = [fork(lambda number=number: work(config, number)) for number in range(3)]
    assert [end_of(child) for child in children] == [0, 0, 0]
    assert files_of(config.out) == files_of(bank.folder)


@pytest.mark.ci
@pytest.mark.parametrize("flushes", range(3))
@pytest.mark.parametrize("work", [by_part, by_rank])
def test_one_of_three_is_killed(
    work, flushes: int, bank: Bank, config: BankConfig, tmp_path: Path, files_of: Files, monkeypatch
) -> None:
    """Before it flushes its shard's vectors, tokens or facts; the others have a shard in hand, too, at that moment."""
    in_hand = tmp_path / "in hand"
    prepare = fill_module._prepare

    def after_the_first(*arguments):
        wait_for(in_hand)
        return prepare(*arguments)

    def doomed() -> None:
        def first(*arguments):
            in_hand.touch()
            return prepare(*arguments)

        monkeypatch.setattr(fill_module, "_prepare", first)
        die_before(flushes, monkeypatch)
        work(config, 1)

    monkeypatch.setattr(fill_module, "_prepare", after_the_first)
    children = [fork(lambda: work(config, 0)), fork(doomed), fork(lambda: work(config, 2))]
    assert [end_of(child) for child in children] == [0, -signal.SIGKILL, 0]
    assert is_complete(config.out) == (work is by_rank)  # who is not bound to parts takes over what the dead one had
    work(config, 1)
    assert files_of(config.out) == files_of(bank.folder)


def die_before(flushes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process kill itself before the flush, after so many others, of a shard's file."""
    write, fsync = ShardBuffer.write, os.fsync

    def doomed(buffer: ShardBuffer) -> None:
        left = [flushes]

        def flush(descriptor: int) -> None:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", flush)
        write(buffer)

    monkeypatch.setattr(ShardBuffer, "write", doomed)


@pytest.mark.parametrize("work", [by_part, by_rank])
def test_one_is_late(work, bank: Bank, config: BankConfig, encoded: list[int], files_of: Files) -> None:
    """The others are done with what is theirs, and gone, when it begins; and once more when all is whole."""
    children = [fork(lambda number=number: work(config, number)) for number in (0, 2)]
    assert [end_of(child) for child in children] == [0, 0]
    left = 40 if work is by_part else 0  # shards 1, 4 and 7, the last of which has 8 captions; by rank nothing is left
    assert is_complete(config.out) == (left == 0)
    for expected in (left, 0):
        encoded.clear()
        work(config, 1)
        assert sum(encoded) == expected
        assert files_of(config.out) == files_of(bank.folder)


def test_processes_that_fail_do_not_wait_for_each_other(config: BankConfig, tmp_path: Path, monkeypatch) -> None:
    """Each of two has one of the two shards in hand when the disk is full."""
    prepare = fill_module._prepare

    def both_at_once(layout, table, encoder, reuse, shard):
        (tmp_path / str(shard)).touch()
        wait_for(tmp_path / str(1 - shard))
        return prepare(layout, table, encoder, reuse, shard)

    def full(buffer):
        time.sleep(0.3)  # until the other thread has found nothing to take
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fill_module, "_prepare", both_at_once)
    monkeypatch.setattr(ShardBuffer, "write", full)
    config = dataclasses.replace(config, shard_rows=60)
    children = [fork(lambda rank=rank: by_rank(config, rank)) for rank in (0, 2)]
    assert [end_of(child) for child in children] == [1, 1]


@pytest.mark.slow
def test_under_torchrun(bank: Bank, config: BankConfig, files_of: Files) -> None:
    launcher = "torch.distributed.run --standalone --nproc_per_node 2 -m llm2clip build-bank".split()
    flags = ["--data", *config.data, "--teacher", config.teacher, "--out", str(config.out)]
    flags += "--precision fp32 --shard-rows 16 --device cpu".split()
    run = subprocess.run([sys.executable, "-m", *launcher, *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(config.out)]  # said by rank 0 alone
    assert files_of(config.out) == files_of(bank.folder)


def test_a_shard_that_another_process_made_stays_its_own(
    config: BankConfig, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written again it would be the same but for rounding, as of other hardware; its checksum is in the manifest."""
    take = Claims.take

    def late(claims: Claims, task: str) -> bool:
        if task.startswith("shard"):
            monkeypatch.setattr(Claims, "take", take)
            build_bank(config)
            encoded.clear()
        return take(claims, task)

    monkeypatch.setattr(Claims, "take", late)
    build_bank(config)
    assert encoded == []


LEFTOVERS = ("vectors/.00000.json.tmp", ".table.tmp/texts.arrow", f"{CLAIMS}/shard-00001")


def test_what_killed_processes_left_goes(config: BankConfig) -> None:
    build_bank(dataclasses.replace(config, shard="0/2"))
    for name in LEFTOVERS:
        (config.out / name).parent.mkdir(exist_ok=True)
        (config.out / name).touch()
    build_bank(config)
    assert not list(config.out.rglob(".*"))


def test_two_add_to_a_bank_at_once(bank: Bank, write_captions, tmp_path: Path, monkeypatch, files_of: Files) -> None:
    """Each copies some of the old vectors, one encodes the new ones."""
    monkeypatch.setattr(fill_module, "WAIT_SECONDS", 0.05)
    data = write_captions(tmp_path / "data" / "new.csv", 1, columns={"raw": 6})
    config = BankAddConfig(data=(str(data),), bank=bank.folder, out=tmp_path / "more", device="cpu")
    assert [end_of(child) for child in [fork(lambda: add_to_bank(config)) for _ in range(2)]] == [0, 0]
    assert is_complete(config.out)
    alone = add_to_bank(dataclasses.replace(config, out=tmp_path / "alone"))
    assert files_of(config.out) == files_of(alone)
    np.testing.assert_array_equal(Bank.open(alone).vectors(range(120)), bank.vectors(range(120)))
