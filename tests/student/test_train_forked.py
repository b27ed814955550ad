"""Two data-parallel processes, as forks without torchrun: 64 images each follow 128 in one, step by step."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from llm2clip.errors import UsageError
from llm2clip.student import checkpoint
from llm2clip.student import train as train_module
from llm2clip.student.config import StudentConfig
from llm2clip.student.train import train_student

from .banks import image_samples, small_run, write_test_bank
from .forks import die_within, side_by_side

pytestmark = pytest.mark.own_process


@pytest.fixture(scope="module")
def settings(tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run on a bank of two batches an epoch."""
    folder = tmp_path_factory.mktemp("banks")
    bank = write_test_bank(folder / "bank", image_samples(folder / "images", 256)).folder
    return small_run(bank, tiny_tower, steps=20, batch_size=128)


def values(out: Path, name: str) -> list[float]:
    """What the log says of each step."""
    return [json.loads(line)[name] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.ci
def test_twice_64_follow_128(settings: dict[str, Any], tmp_path: Path) -> None:
    train_student(StudentConfig(**settings, out=tmp_path / "1"))
    run, sizes = StudentConfig(**settings, out=tmp_path / "2"), tmp_path / "sizes"
    sizes.mkdir()

    def train(rank: int) -> None:
        real = train_module.train_step

        def watched(session: Any, batches: Any) -> Any:
            (sizes / f"{rank}").write_text(str([len(batch) for batch in batches]))
            return real(session, batches)

        train_module.train_step = watched
        train_student(run)

    assert side_by_side(2, tmp_path / "meeting", train) == [(0, "")] * 2
    assert [(sizes / f"{rank}").read_text() for rank in range(2)] == ["[64]", "[64]"]
    one, two = values(tmp_path / "1", "loss"), values(tmp_path / "2", "loss")
    assert len(one) == 20 and sum(one[-5:]) < 0.9 * sum(one[:5])
    assert all(abs(a - b) <= 1e-5 * max(1, a) for a, b in zip(one, two, strict=True))
    norms = [values(tmp_path / number, "grad_norm") for number in ("1", "2")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3), "Adam hides a gradient that is too large or small all over"


@pytest.mark.slow
def test_two_processes_killed_and_started_again_end_in_the_same_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    """With all that is random in a step, and reading ahead. Where one dies, the other cannot go on either."""
    settings = {**settings, "steps": 12, "batch_size": 32, "micro_batch_size": 8, "workers": 2, "save_every": 3}
    settings = {**settings, "min_crop": 0.5, "patch_dropout": 0.5, "ema": 0.9}
    whole, run = (StudentConfig(**settings, out=tmp_path / name) for name in ("whole", "killed"))
    assert side_by_side(2, tmp_path / "meeting", lambda rank: train_student(whole)) == [(0, "")] * 2
    kills = [  # who, where, at which entry, and after how many calls within
        (1, train_module, "train_step", 3, 1000),  # no checkpoint yet
        (0, checkpoint._Writer, "write_data", 2, 50),
        (0, train_module, "train_step", 5, 2000),
        (1, train_module, "train_step", 1, 3000),
    ]
    left: list[set[str]] = []
    for number, (victim, owner, name, entry, calls) in enumerate(kills):

        def train(rank: int) -> None:
            if rank == victim:  # noqa: B023
                die_within(owner, name, entry=entry, calls=calls)  # noqa: B023
            train_student(run)

        ended = side_by_side(2, tmp_path / f"meeting{number}", train)
        assert ended[victim][0] == -signal.SIGKILL, ended
        assert ended[1 - victim][0] == 1 and "Error" in ended[1 - victim][1], ended
        left.append({path.name for path in (run.out / "checkpoints").glob("*")})
    assert left[:3] == [set(), {".writing-00000006", "step-00000003"}, {"step-00000003", "step-00000006"}]
    assert side_by_side(2, tmp_path / "last", lambda rank: train_student(run)) == [(0, "")] * 2
    assert values(run.out, "step") == list(range(1, 13))
    for name in ("model.safetensors", "manifest.json"):
        assert (run.out / name).read_bytes() == (whole.out / name).read_bytes(), name


@pytest.mark.ci
@pytest.mark.parametrize(
    "wrong", [pytest.param({0, 1}, marks=pytest.mark.slow), {0}, pytest.param({1}, marks=pytest.mark.slow)], ids=str
)
def test_what_cannot_be_in_one_process_ends_both_and_leaves_nothing(
    wrong: set[int], settings: dict[str, Any], tmp_path: Path
) -> None:
    """A folder may be missing on one machine of several. torchrun ends all as soon as one has failed."""
    tower, run = settings["tower"], StudentConfig(**{**settings, "steps": 1}, out=tmp_path / "out")

    def train(rank: int) -> None:
        mine = dataclasses.replace(run, tower="./towre" if rank in wrong else tower)
        with pytest.raises(UsageError, match=r"tower \./towre is no folder"):
            train_student(mine)
        assert not (run.out / "run.json").exists(), "torchrun may kill the main process before it removes it"

    assert side_by_side(2, tmp_path / "meeting", train) == [(0, "")] * 2
    assert not run.out.exists()
    assert side_by_side(2, tmp_path / "again", lambda rank: train_student(run)) == [(0, "")] * 2
