"""Checkpoints: everything comes back, the last two are kept, a torn one is not taken for whole."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm2clip.errors import ArtifactError
from llm2clip.student import checkpoint
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
    save_checkpoint(tmp_path, 1, state_tensors(model, optimizers), {}, process=1, num_processes=2)
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
    (tmp_path / "checkpoints" / "step-00000003" / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="step-00000003 is damaged"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_text('{"step": 3}')
    with pytest.raises(ArtifactError, match="step-00000003 is damaged"):
        load_checkpoint(tmp_path)


def test_a_part_written_where_the_first_process_does_not_see_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "DTensor", torch.Tensor)  # as if the tensor were in shards
    with pytest.raises(ArtifactError, match="process 1 wrote its part of step-00000005 elsewhere"):
        save_checkpoint(tmp_path, 5, {"model/x": torch.zeros(1)}, {}, process=0, num_processes=2)
    assert load_checkpoint(tmp_path) is None


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
    files = {p.name for p in (tmp_path / "checkpoints" / "step-00000001").iterdir()}
    assert files == {"state.safetensors", "state.json"}
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
        step(student, student, optimizers, seed)  # the same pictures on all: the mean gradient is that of one
    save_checkpoint(
        Path(folder),
        int(last),
        state_tensors(student, optimizers),
        {},
        process=rank,
        num_processes=int(world),
        wait=torch.distributed.barrier,
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
    files = {path.name for path in (tmp_path / "checkpoints" / "step-00000002").iterdir()}
    assert files == {"state.json", *(f"state-{i:05d}-of-00003.safetensors" for i in range(3))}
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
