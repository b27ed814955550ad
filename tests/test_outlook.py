"""What a training takes, whether it can learn, and whether it did: each line by hand."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm2clip import outlook
from llm2clip.errors import settings_as_flags
from llm2clip.journal import LOG, Journal, logged
from llm2clip.outlook import has_gained, has_not_moved, learned_nothing, more_steps, near_chance, too_few_steps
from llm2clip.progress import Progress

CPU = torch.device("cpu")


@pytest.fixture
def flags() -> Iterator[None]:
    """Messages as the command line has them."""
    with settings_as_flags():
        yield


@pytest.mark.parametrize(
    ("kind", "images", "steps", "batch_size", "told"),
    [
        # 300 steps of 4 a pass are 75 passes, rounded up to one digit
        ("teacher", 1100, 4, 256, "4 steps of 256; a teacher needs some hundreds: give --epochs 80"),
        # a step a pass: of 300 images a quarter is 75, and 64 the power of two below; 300 / 4 passes
        ("student", 300, 4, 300, "4 steps of 300; a student needs some hundreds: give --batch-size 64 --epochs 80"),
        # a quarter of 24 is 6, and a batch has 16 at least: one step a pass
        ("student", 24, 1, 24, "1 step of 24; a student needs some hundreds: give --batch-size 16 --epochs 300"),
        ("teacher", 12, 10, 6, "10 steps of 6; a teacher needs some hundreds: give --epochs 200"),  # 150 passes of 2
        (
            "student",
            10_000,
            9,
            4096,
            "9 steps of 4,096; a student needs some hundreds: give --batch-size 2048 --epochs 80",
        ),
        ("teacher", 6400, 39, 64, "39 steps of 64; a teacher needs some hundreds: give --epochs 3"),
        ("teacher", 6400, 40, 64, ""),
        ("student", 6400, 47, 64, "47 steps of 64; a student needs some hundreds: give --epochs 3"),
        ("student", 6400, 48, 64, ""),
    ],
)
def test_too_few_steps_by_hand(flags: None, kind: str, images: int, steps: int, batch_size: int, told: str) -> None:
    assert too_few_steps(kind, [images], steps=steps, batch_size=batch_size) == told


def test_what_is_advised_is_of_the_kind_that_was_given_and_fits_the_run(flags: None) -> None:
    assert too_few_steps("teacher", [300], steps=3, batch_size=300, by_steps=True).endswith("give --steps 300")
    assert more_steps([640, 63], batch_size=64) == "--epochs 30", "a task that fills no batch gives no step"
    assert more_steps([640], batch_size=64, accumulate=10) == "--epochs 300", "ten batches a step: a step a pass"
    assert more_steps([300], batch_size=300, num_processes=3) == "--batch-size 63 --epochs 80", "63 / 3 on each"
    assert more_steps([40], batch_size=24, num_processes=24) == "--epochs 300", "no batch is below the processes"


@pytest.mark.parametrize("images", [20, 100, 300, 1000, 3000, 40_000])
@pytest.mark.parametrize("batch_size", [16, 64, 256])
def test_what_is_advised_is_enough(images: int, batch_size: int) -> None:
    if images < batch_size:
        return
    words = dict(word.split("=") for word in more_steps([images], batch_size=batch_size).split())
    size = int(words.get("batch_size", batch_size))
    steps = images // size * int(words["epochs"])
    assert size <= batch_size and outlook.ENOUGH <= steps <= max(2 * outlook.ENOUGH, images // size)


def test_bytes_on_the_disk_by_hand() -> None:
    """Three checkpoints of weights and two moments of 10 MB each, the model of 50 MB, 1,000 lines of 200 bytes."""
    found = outlook.training_bytes(10_000_000, 50_000_000, checkpoints=3, steps=1000)
    assert found == 3 * 30_000_000 + 50_000_000 + 200_000
    assert outlook.training_bytes(1, 0, checkpoints=2, steps=0, others=5) == 2 * (3 + 5)


def test_a_line_of_the_log_fits_its_bytes(tmp_path: Path) -> None:
    values = dict.fromkeys(("loss", "accuracy", "scale", "grad_norm"), torch.tensor(-1.234567e-10))
    journal = Journal(accelerator(), tmp_path, total=9, step=0, images=123_456)
    journal.add(123_456_789, values)
    journal.flush()
    assert len((tmp_path / LOG).read_bytes()) <= outlook.LOG_BYTES


def accelerator() -> Any:
    """What a journal needs of one."""
    return SimpleNamespace(is_main_process=True, trackers=(), scaler=None, log=lambda values, step: None)


def test_memory_is_at_least_what_is_held_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    assert outlook._peak_memory() >= 0.9 * pages * resource.getpagesize()  # the kernel counts in its own time
    monkeypatch.setattr(outlook, "_peak_memory", lambda: 6_000_000_000)
    assert outlook.needs(CPU, 1_200_000_000) == "6 GB of memory, 1.2 GB on disk"
    assert outlook.needs(None, 1_200_000_000) == "6 GB of memory, 1.2 GB on disk"
    monkeypatch.setattr(outlook, "_peak_memory", lambda: 0)
    assert outlook.needs(CPU, 1_200_000_000) == "1.2 GB on disk", "where the system does not say"
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_000_000_000)
    assert outlook.needs(torch.device("cuda"), 5) == "7 GB of GPU memory, 5 B on disk"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved by hand; stderr is no terminal."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    return now


def test_the_estimate_is_said_once_and_leaves_the_first_step_out(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llm2clip")
    with Progress(602, description="train", unit="steps", estimate=lambda: "6 GB") as progress:
        told = []
        for step in range(1, 10):
            clock[0] += 100 if step == 1 else 20  # what is compiled in the first step would make it an hour more
            progress.advance()
            told += [(step, text) for text in caplog.messages if "about" in text and (step, text) not in told][-1:]
            caplog.clear()
    assert told == [(3, "train: about 3 h 19 min, 6 GB")], "599 steps of 20 seconds"


def test_an_estimate_is_of_a_second_at_least_and_of_what_takes_longer_than_a_line(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llm2clip")
    with Progress(204, description="train", unit="steps", initial=4, estimate=lambda: "6 GB") as progress:
        for step in range(5, 100):
            clock[0] += 0.125
            progress.advance()
            assert ("train: about 24 s, 6 GB" in caplog.messages) == (step >= 13), "191 eighths, a second after step 5"
    caplog.clear()
    with Progress(100, description="train", unit="steps", estimate=lambda: "6 GB") as progress:
        for _ in range(100):
            clock[0] += 0.125
            progress.advance()
    assert "about" not in caplog.text


def test_an_estimate_goes_by_work(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """Long captions come first: of 100 units of work 10 are done, then 30 more in 30 s, and 60 are left."""
    caplog.set_level("INFO", "llm2clip")
    with Progress(100, description="encode", unit="captions", estimate=lambda: "6 GB") as progress:
        clock[0] = 50.0
        progress.advance(2, work=10.0)
        clock[0] = 80.0
        progress.advance(5, work=30.0)
    assert "encode: about 1 min 0 s, 6 GB" in caplog.messages


def test_a_journal_has_the_first_steps_told_at_once(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llm2clip")
    journal = Journal(accelerator(), tmp_path, total=604, step=4, estimate=lambda: "6 GB")
    written = []
    for step in range(5, 28):
        clock[0] += 60
        journal.add(step, {"loss": torch.tensor(1.0)})
        written.append(len(logged(tmp_path / LOG, "loss")))
        assert ("train student: about 9 h 57 min, 6 GB" in caplog.messages) == (step >= 7)
    assert written == [1, 1, 3, 3, 5, 5, 5, 5, 5, *[10] * 10, *[20] * 4]
    assert sum("about" in text for text in caplog.messages) == 1


def test_a_log_is_read_for_its_losses(tmp_path: Path) -> None:
    assert logged(tmp_path / LOG, "loss") == []
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "val/r@1": 0.5}, {"step": 2, "loss": None}]
    (tmp_path / LOG).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert logged(tmp_path / LOG, "loss") == [{"step": 1, "loss": 2.0}]


def test_the_ends_of_a_run_are_of_ten_steps_or_a_third() -> None:
    assert outlook.ends([3.0]) == (3.0, 3.0)
    assert outlook.ends([4.0, 2.0, 1.0, 1.0, 6.0, 8.0]) == (3.0, 7.0)
    assert outlook.ends([*[1.0] * 10, *[5.0] * 80, *[2.0] * 10]) == (1.0, 2.0)


LN = math.log(96)  # 4.56


@pytest.mark.parametrize(
    ("first", "last", "stands"),
    [
        (6.0, 4.56, True),  # collapsed: all vectors alike
        (4.6, 4.55, True),  # a few steps
        (3.2, 3.15, True),  # began below a guesser, and stayed there
        (6.0, 4.2, False),
        (4.6, 4.3, False),
        (3.2, 2.9, False),
        (0.31, 0.31, False),  # one that had learned before
    ],
)
def test_a_loss_that_stands_where_it_began_or_where_a_guesser_is(first: float, last: float, stands: bool) -> None:
    assert has_not_moved(first, last, guessing=LN) == stands


def test_near_chance() -> None:
    """Of ten steps of 128 images a guesser finds ten, give or take three; 24 may be chance, 31 are none."""
    assert near_chance(24 / 1280, 128) and not near_chance(31 / 1280, 128)
    assert near_chance(0.49, 6) and not near_chance(0.0, 5), "of five captions even none may be found by chance"


def test_a_gain_is_above_what_chance_gives() -> None:
    assert not has_gained(0.10, 0.13, 100) and has_gained(0.10, 0.20, 100)
    assert not has_gained(0.0, 0.0, 24) and not has_gained(0.5, 0.4, 1000)


def test_what_is_said_names_both_values_and_what_to_do() -> None:
    told = learned_nothing("student", 4.9, 4.856, guessing=math.log(128), found="0.9% of", advice="give epochs=80")
    assert told == (
        "the student has learned nothing: its loss is 4.856, 4.9 at the start, 4.852 for who guesses; 0.9% of; give "
        "epochs=80"
    )
    told = learned_nothing("teacher", 9.9, 9.8, guessing=None, found="", advice="give epochs=80")
    assert told == "the teacher has learned nothing: its loss is 9.8, 9.9 at the start; give epochs=80"
