"""Checkpoints: everything comes back in any shards, the last two are kept, a torn one is not taken for whole."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llm2clip.errors import ArtifactError
from llm2clip.student.checkpoint import (
    drop_checkpoints,
    load_checkpoint,
    restore_state,
    save_best,
    save_checkpoint,
    state_tensors,
    tensors_fingerprint,
    whole_weights,
)

if __name__ != "__main__":
    from .forks import side_by_side

WHOLE = torch.arange(30).reshape(5, 6)


def trained(steps: int, *, seed: int = 0):
    """A small model after `steps` of two optimizers, as Muon and AdamW share a student."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    optimizers = [
        torch.optim.SGD([model[0].weight], lr=0.1, momentum=0.9),
        torch.optim.AdamW([p for p in model.parameters() if p is not model[0].weight], lr=0.1),
    ]
    train(model, optimizers, range(steps))
    return model, optimizers


def train(model, optimizers, steps) -> None:
    for step in steps:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_training_goes_on_bit_for_bit(tmp_path) -> None:
    whole, _ = trained(7)
    model, optimizers = trained(4)
    average = {name: p.detach() + 1 for name, p in model.named_parameters()}
    save_checkpoint(tmp_path, 4, state_tensors(model, optimizers, average=average), {"bad": {"gone": 2}})
    saved, facts = load_checkpoint(tmp_path)
    assert facts == {"step": 4, "bad": {"gone": 2}}
    again, others = trained(0, seed=1)
    blank = {name: torch.zeros_like(p) for name, p in again.named_parameters()}
    restore_state(saved, again, others, average=blank)
    assert all(torch.equal(blank[name], average[name]) for name in blank)
    train(again, others, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_parameters_that_have_not_learned_yet(tmp_path) -> None:
    """A tower that is still frozen has no optimizer state: none is invented on the way back."""
    model, optimizers = trained(0)
    save_checkpoint(tmp_path, 0, state_tensors(model, optimizers), {})
    restore_state(load_checkpoint(tmp_path)[0], model, optimizers)
    assert not optimizers[0].state and not optimizers[1].state


def test_processes_that_hold_no_shards_write_and_copy_nothing(tmp_path) -> None:
    model, optimizers = trained(1)
    save_checkpoint(tmp_path, 1, state_tensors(model, optimizers), {}, is_main=False)
    assert not list(tmp_path.iterdir())
    assert whole_weights(model, keep=False) == {}


def test_the_last_two_are_kept(tmp_path) -> None:
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, {"model/x": torch.tensor([step])}, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000100"]
    drop_checkpoints(tmp_path)
    assert load_checkpoint(tmp_path) is None and not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_half_written_is_no_checkpoint(tmp_path) -> None:
    save_checkpoint(tmp_path, 1, {"model/x": torch.zeros(1)}, {})
    torn = tmp_path / "checkpoints" / ".writing-00000007"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path)[1]["step"] == 1
    save_checkpoint(tmp_path, 2, {"model/x": torch.zeros(1)}, {})
    assert load_checkpoint(tmp_path)[1]["step"] == 2
    assert not torn.exists()


def test_damage_is_named(tmp_path) -> None:
    save_checkpoint(tmp_path, 3, {"model/x": torch.zeros(1)}, {})
    (file,) = (tmp_path / "checkpoints" / "step-00000003").glob("*.safetensors")
    file.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="step-00000003 is damaged"):
        load_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"step-00000003 is damaged \(0 of 1 files are there\)"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_text('{"step": 3}')
    with pytest.raises(ArtifactError, match="step-00000003 is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_what_goes_wrong_is_told_as_it_is(tmp_path, monkeypatch, error) -> None:
    """Not as torch's list of tracebacks, which no `except Exception` would catch."""

    def breaks(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", breaks)
    with pytest.raises(type(error)) as caught:
        save_checkpoint(tmp_path, 3, {"model/x": torch.zeros(1)}, {})
    assert caught.value is error and load_checkpoint(tmp_path) is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    model, optimizers = trained(1)
    save_checkpoint(tmp_path, 1, state_tensors(model, optimizers), {})
    saved, _ = load_checkpoint(tmp_path)
    wider = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    with pytest.raises(ArtifactError, match=r"2\.weight has shape \(2, 4\), not \(3, 4\)"):
        restore_state(saved, wider, [])
    with pytest.raises(ArtifactError, match=r"3\.weight is missing"):
        restore_state(saved, torch.nn.Sequential(*model, torch.nn.Linear(2, 2)), [])


def test_it_is_no_pickle(tmp_path) -> None:
    save_checkpoint(tmp_path, 1, {"model/x": torch.zeros(1)}, {})
    facts, tensors = sorted((tmp_path / "checkpoints" / "step-00000001").iterdir(), key=lambda path: path.suffix)
    assert facts.name == "state.json" and torch.equal(load_file(tensors)["model/x"], torch.zeros(1))
    assert json.loads((tmp_path / "checkpoints" / "step-00000001" / "state.json").read_text())["step"] == 1


def test_every_file_is_on_the_disk_before_it_has_its_name(tmp_path, renames) -> None:
    save_checkpoint(tmp_path, 3, {"model/x": torch.zeros(3)}, {})
    save_best(tmp_path, {"x": torch.zeros(3)})
    assert renames == {"step-00000003": [], "best.safetensors": []}


def test_a_fingerprint_is_of_names_shapes_dtypes_and_bytes() -> None:
    x = torch.arange(6.0)
    by_hand = b"a (2, 3) torch.float32" + x.numpy().tobytes() + b"b (6,) torch.int64" + x.long().numpy().tobytes()
    found = tensors_fingerprint({"b": x.long(), "a": x.reshape(2, 3)})
    assert found == hashlib.sha256(by_hand).hexdigest()[:16]


def on_mesh(shape: tuple[int, ...], placements: list, whole: torch.Tensor = WHOLE) -> DTensor:
    """What this process of a mesh holds of the whole."""
    return distribute_tensor(whole, init_device_mesh("cpu", shape), placements, src_data_rank=None)


def holder(x: torch.Tensor) -> torch.nn.Module:
    """A model of nothing but `x` and a count."""
    model = torch.nn.Module()
    model.register_buffer("x", x)
    model.register_buffer("count", torch.tensor(0))
    return model


def save_in_shards(folder: Path, shape: tuple[int, ...], placements: list) -> None:
    def save(rank: int) -> None:
        tensors = {"model/x": on_mesh(shape, placements), "model/count": torch.tensor(3)}
        save_checkpoint(folder, 1, tensors, {}, is_main=rank == 0)

    number = math.prod(shape)
    assert side_by_side(number, folder / "meeting", save) == [(0, "")] * number


def parts_of(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints" / "step-00000001").glob("*.safetensors"))


MESHES = {
    "rows that do not divide": ((4,), [Shard(0)]),
    "processes without any": ((8,), [Shard(0)]),
    "copies of shards (HSDP)": ((2, 2), [Replicate(), Shard(0)]),
    "cut both ways": ((2, 2), [Shard(0), Shard(1)]),
}


@pytest.mark.ci
@pytest.mark.own_process
def test_shards_on_a_mesh_are_written_once_and_read_in_others(tmp_path) -> None:
    for name, (shape, placements) in MESHES.items():
        folder = tmp_path / name
        folder.mkdir()
        save_in_shards(folder, shape, placements)
        parts = [load_file(path) for path in parts_of(folder)]
        assert sum(part["model/x"].numel() for part in parts if "model/x" in part) == WHOLE.numel(), name
        assert sum("model/count" in part for part in parts) == 1, name
        again = holder(torch.zeros_like(WHOLE))
        restore_state(load_checkpoint(folder)[0], again, [])
        assert torch.equal(again.x, WHOLE) and again.count == 3, name

    def read(rank: int) -> None:
        for name in MESHES:
            again = holder(on_mesh((3,), [Shard(0)], torch.zeros_like(WHOLE)))
            restore_state(load_checkpoint(tmp_path / name)[0], again, [])
            assert torch.equal(again.x.to_local(), on_mesh((3,), [Shard(0)]).to_local()) and again.count == 3, name

    assert side_by_side(3, tmp_path / "again", read) == [(0, "")] * 3


@pytest.mark.ci
@pytest.mark.own_process
def test_a_part_that_no_file_holds_is_found(tmp_path) -> None:
    save_in_shards(tmp_path, (3,), [Shard(0)])
    part = parts_of(tmp_path)[1]
    with safe_open(part, framework="pt") as file:
        places = file.metadata()
    save_file({name: value for name, value in load_file(part).items() if name != "model/x"}, part, places)
    with pytest.raises(ArtifactError, match=r"step-00000001 is damaged \(model/x is not whole\)"):
        load_checkpoint(tmp_path)
    part.unlink()
    with pytest.raises(ArtifactError, match=r"step-00000001 is damaged \(2 of 3 files are there\)"):
        load_checkpoint(tmp_path)


@pytest.mark.ci
@pytest.mark.own_process
def test_a_part_written_where_the_first_process_does_not_see_it(tmp_path) -> None:
    def save(rank: int) -> None:
        tensors = {"model/x": on_mesh((2,), [Shard(0)])}
        save_checkpoint(tmp_path / f"machine {rank}", 5, tensors, {}, is_main=rank == 0)

    first, second = side_by_side(2, tmp_path / "meeting", save)
    assert "ArtifactError: process 1 wrote its part of step-00000005 elsewhere" in first[1] and second == (0, "")
    assert load_checkpoint(tmp_path / "machine 0") is None


def student_and_optimizer():
    """A tiny student with one optimizer, the same in every process."""
    from transformers import CLIPVisionConfig

    from llm2clip.student.model import Student, StudentModelConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=8)
    config = StudentModelConfig(vision_config=vision, tower_dim=16, teacher_dim=8, projection_dim=6, image_size=16)
    student = Student(config)
    return student, [torch.optim.AdamW(student.parameters(), lr=0.01, fused=True)]


def step(model, student, optimizers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, text, scale = model(torch.rand(4, 3, 16, 16, generator=generator), torch.randn(4, 8, generator=generator))
    torch.nn.functional.cross_entropy(scale * image @ text.T, torch.arange(4)).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    student.clamp_logit_scale()


def sharded_process(folder: str, world: str, first: str, last: str) -> None:
    """One of several processes with a student in FSDP2 shards: on from the checkpoint, to a new one."""
    from torch.distributed.fsdp import fully_shard

    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet{world}", rank=rank, world_size=int(world))
    student, _ = student_and_optimizer()
    for block in [*student.tower.encoder.layers, *student.adaptor.blocks]:
        fully_shard(block)
    fully_shard(student)
    optimizers = [torch.optim.AdamW(student.parameters(), lr=0.01)]
    if saved := load_checkpoint(Path(folder)):
        restore_state(saved[0], student, optimizers)
    for seed in range(int(first), int(last)):
        step(student, student, optimizers, seed)  # the same images on all: the mean gradient is that of one
    save_checkpoint(
        Path(folder),
        int(last),
        state_tensors(student, optimizers),
        {},
        is_main=rank == 0,
    )
    torch.distributed.destroy_process_group()


def run_sharded(*arguments: object) -> None:
    environments = [{**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank)} for rank in range(int(arguments[1]))]
    command = [sys.executable, __file__, *map(str, arguments)]
    processes = [subprocess.Popen(command, env=each) for each in environments]
    assert [process.wait() for process in processes] == [0] * len(processes)


@pytest.mark.slow
def test_shards_of_three_processes_go_on_in_two_and_in_one(tmp_path) -> None:
    run_sharded(tmp_path, 3, 0, 2)
    suffixes = [path.suffix for path in (tmp_path / "checkpoints" / "step-00000002").iterdir()]
    assert sorted(suffixes) == [".json", *[".safetensors"] * 3]
    run_sharded(tmp_path, 2, 2, 3)
    student, optimizers = student_and_optimizer()
    restore_state(load_checkpoint(tmp_path)[0], student, optimizers)
    step(student, student, optimizers, 3)
    whole, others = student_and_optimizer()
    for seed in range(4):
        step(whole, whole, others, seed)
    expected = state_tensors(whole, others)
    for name, value in state_tensors(student, optimizers).items():
        if "k_proj.bias" not in name:  # its gradient is rounding alone
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    sharded_process(*sys.argv[1:])
