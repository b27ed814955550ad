"""Two processes follow one: same batches, same losses, and a run that goes on with another number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bank(tiny_llm, images_csv, tmp_path_factory) -> Path:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    out = tmp_path_factory.mktemp("banks") / "bank"
    return build_bank(BankConfig(data=(str(images_csv),), teacher=str(tiny_llm), out=out))


def launch(
    processes: int, bank: Path, tower: Path, out: Path, *flags: str, script: tuple[str, ...] = ("-m", "llm2clip")
) -> subprocess.CompletedProcess:
    """`llm2clip train-student` on the CPU under torchrun with that many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [*script, "train-student", "--bank", str(bank), "--tower", str(tower), "--out", str(out)]
    command += ["--batch-size", "8", "--learning-rate", "1e-3", "--dim", "16", "--workers", "0"]
    command += ["--precision", "fp32", "--tracker", "none", *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


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
    assert manifests[0]["bad_images"] == manifests[1]["bad_images"]


def test_wrong_use_ends_all_processes(bank, tiny_tower, tmp_path) -> None:
    done = launch(2, bank, tiny_tower, tmp_path / "out", "--steps", "2", "--batch-size", "9")
    assert done.returncode != 0
    assert done.stderr.count("llm2clip: error:") >= 1 and "--batch-size 9 does not divide" in done.stderr
    assert not (tmp_path / "out").exists(), "in the way of the corrected command"


def test_a_tower_with_a_parameter_that_no_image_reaches(bank, towers, tmp_path) -> None:
    """DINOv2's mask token: a data-parallel run would stop at its second step."""
    done = launch(2, bank, towers["dinov2"], tmp_path / "out", "--steps", "3")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "flags",
    [
        ("--micro-batch-size", "3", "--ema", "0.9", "--val-every", "4"),
        ("--lora-rank", "2", "--accumulate", "2", "--loss", "sigmoid"),
        ("--adaptor-warmup-steps", "4"),
    ],
    ids=" ".join,
)
def test_shards_of_fsdp2_follow_one_process_and_go_on_in_it(bank, tiny_tower, tmp_path, flags) -> None:
    """Two processes in shards are killed; one process without shards ends the run as if it had done all of it."""
    flags = (*flags, "--steps", "8", "--save-every", "3")
    if "--val-every" in flags:
        flags = (*flags, "--val-bank", str(bank))
    whole = launch(1, bank, tiny_tower, tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr[-3000:]
    out = tmp_path / "broken"
    broken = launch(2, bank, tiny_tower, out, *flags, script=(__file__, "7"))
    assert "killed by the test" in broken.stderr, broken.stderr[-3000:]
    assert len(list((out / "checkpoints" / "step-00000006").glob("*.safetensors"))) == 2
    done = launch(1, bank, tiny_tower, out, *flags)
    assert done.returncode == 0 and "going on from step 6" in done.stderr, done.stderr[-3000:]
    one, two = losses(tmp_path / "whole"), losses(out)
    assert len(two) == 8 and all(abs(a - b) < 1e-4 * max(1, a) for a, b in zip(one, two, strict=True))


def _in_shards(last_step: int, arguments: list[str]) -> None:
    """`llm2clip` with FSDP2, which accelerate offers on no CPU; ends before `last_step`."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from llm2clip.cli import main
    from llm2clip.student import train

    start, step = train.start_accelerator, train.train_step

    def sharding(config):
        accelerator = start(config)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", cpu_ram_efficient_loading=False
        )
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        assert accelerator.is_fsdp2
        return accelerator

    def dies(session, batches):
        if session.step == last_step:
            raise SystemExit("killed by the test")
        return step(session, batches)

    train.start_accelerator, train.train_step = sharding, dies
    main(arguments)


if __name__ == "__main__":
    _in_shards(int(sys.argv[1]), sys.argv[2:])
