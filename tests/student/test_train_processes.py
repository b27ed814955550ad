"""Two processes follow one: same batches, same losses, and a run that goes on with another number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bank(tiny_llm, pictures_csv, tmp_path_factory) -> Path:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    out = tmp_path_factory.mktemp("banks") / "bank"
    return build_bank(BankConfig(data=(str(pictures_csv),), teacher=str(tiny_llm), out=out))


def launch(processes: int, bank: Path, tower: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
    """`llm2clip train-student` on the CPU under torchrun with that many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "llm2clip", "train-student", "--bank", str(bank), "--tower", str(tower), "--out", str(out)]
    command += ["--batch-size", "8", "--learning-rate", "1e-3", "--dim", "16", "--workers", "0"]
    command += ["--precision", "fp32", "--tracker", "none", *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--micro-batch-size", "3", "--accumulate", "2"),
        ("--loss", "sigmoid", "--adaptor-warmup-steps", "5", "--ema", "0.9"),
    ],
    ids=" ".join,
)
def test_two_processes_follow_one(bank, tiny_tower, tmp_path, flags) -> None:
    for processes in (1, 2):
        done = launch(processes, bank, tiny_tower, tmp_path / str(processes), "--steps", "20", *flags)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 20 and all(abs(a - b) < 1e-5 * max(1, a) for a, b in zip(one, two, strict=True))
    manifests = [json.loads((tmp_path / str(n) / "manifest.json").read_text()) for n in (1, 2)]
    assert manifests[0]["bad_pictures"] == manifests[1]["bad_pictures"]


def test_wrong_use_ends_all_processes(bank, tiny_tower, tmp_path) -> None:
    done = launch(2, bank, tiny_tower, tmp_path / "out", "--steps", "2", "--batch-size", "9")
    assert done.returncode != 0
    assert done.stderr.count("llm2clip: error:") >= 1 and "--batch-size 9 does not divide" in done.stderr
