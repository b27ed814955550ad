"""Parameter groups, layer-wise rates and the schedule, for every family of towers."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from llm2clip.student.checkpoint import load_checkpoint, restore_state, save_checkpoint, state_tensors
from llm2clip.student.model import Student, StudentModelConfig
from llm2clip.student.optim import build_optimizer, cosine_factor, decays, tower_learning_rates

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
TOWERS: dict[str, tuple[Any, str]] = {
    "clip": (CLIPVisionConfig(intermediate_size=32, **SIZES), "encoder.layers"),
    "siglip": (SiglipVisionConfig(intermediate_size=32, **SIZES), "encoder.layers"),
    "dinov2": (Dinov2Config(**SIZES), "encoder.layer"),
    "dinov3": (DINOv3ViTConfig(intermediate_size=32, **SIZES), "model.layer"),
    "vit": (ViTConfig(intermediate_size=32, **SIZES), ""),
}


def student(loss: str = "softmax") -> Student:
    torch.manual_seed(0)
    config = TOWERS["clip"][0]
    return Student(
        StudentModelConfig(
            vision_config=config,
            tower_dim=16,
            teacher_dim=12,
            projection_dim=8,
            adaptor_blocks=1,
            image_size=16,
            loss=loss,
        )
    )


def timm_tower() -> Any:
    pytest.importorskip("timm")
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 28}
    return AutoModel.from_config(
        TimmWrapperConfig(architecture="eva02_tiny_patch14_224", model_args=arguments, do_pooling=True)
    )


@pytest.mark.parametrize("family", [*TOWERS, "timm"])
def test_only_weights_of_layers_decay(family: str) -> None:
    tower = timm_tower() if family == "timm" else AutoModel.from_config(TOWERS[family][0])
    chosen = decays(tower)
    for name, parameter in tower.named_parameters():
        free = parameter.ndim < 2 or any(word in name for word in ("position", "pos_embed", "token", "probe", "norm"))
        assert (name in chosen) != free, name


@pytest.mark.parametrize("family", [*TOWERS, "timm"])
def test_each_layer_learns_slower_than_the_next(family: str) -> None:
    tower = timm_tower() if family == "timm" else AutoModel.from_config(TOWERS[family][0])
    rates = tower_learning_rates(tower, layer_decay=0.5)
    assert set(rates) == {name for name, _ in tower.named_parameters()}
    for name, rate in rates.items():
        if any(word in name for word in ("embed", "token", "pre_layrnorm")):
            assert rate == 0.125, name
        elif ".0." in name:
            assert rate == 0.25, name
        elif ".1." in name:
            assert rate == 0.5, name
        else:
            assert rate == 1, name
    assert set(rates.values()) == {0.125, 0.25, 0.5, 1.0}


def test_every_learning_parameter_is_in_one_group_with_its_rate_and_decay() -> None:
    model = student("sigmoid")
    model.tower.embeddings.requires_grad_(False)
    optimizer = build_optimizer(model, learning_rate=1.0, fresh_learning_rate=7.0, weight_decay=0.05, layer_decay=0.5)
    names = {p: name for name, p in model.named_parameters()}
    groups = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    assert set(groups) == {name for name, p in model.named_parameters() if p.requires_grad}
    seen = {name: (groups[name]["lr"], groups[name]["weight_decay"]) for name in groups}
    assert seen["tower.encoder.layers.0.mlp.fc1.weight"] == (0.25, 0.05)
    assert seen["tower.encoder.layers.1.mlp.fc1.bias"] == (0.5, 0)
    assert seen["tower.post_layernorm.weight"] == (1.0, 0)
    assert seen["visual_projection.weight"] == (7.0, 0.05)
    assert seen["adaptor.blocks.0.expand.weight"] == (7.0, 0.05)
    assert seen["adaptor.norm.weight"] == (7.0, 0)
    assert seen["logit_scale"] == seen["logit_bias"] == (7.0, 0)


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = student()
    optimizer = build_optimizer(model, kind="muon", learning_rate=1e-3)
    names = {p: name for name, p in model.named_parameters()}
    hidden = {names[p] for group in optimizer.muon.param_groups for p in group["params"]}
    rest = {names[p] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert not hidden & rest
    assert hidden | rest == set(names.values())
    assert {n for n in hidden if n.startswith("adaptor")} == {
        "adaptor.blocks.0.expand.weight",
        "adaptor.blocks.0.shrink.weight",
    }
    assert "tower.encoder.layers.0.self_attn.q_proj.weight" in hidden
    assert {
        "visual_projection.weight",
        "adaptor.projection.weight",
        "tower.embeddings.position_embedding.weight",
    } <= rest
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_muons_updates_are_as_large_as_adamws() -> None:
    """0.2 of the rate, root mean square (arXiv 2502.16982), whatever the shape; its iteration is not exact."""
    model = student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, kind="muon", learning_rate=1e-3, fresh_learning_rate=2e-3, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    moved = {name: (p.detach() - before[name]).square().mean().sqrt().item() for name, p in model.named_parameters()}
    for name, rate in (
        ("tower.encoder.layers.0.mlp.fc1.weight", 1e-3),  # [32, 16]
        ("tower.encoder.layers.1.mlp.fc2.weight", 1e-3),  # [16, 32]
        ("tower.encoder.layers.0.self_attn.q_proj.weight", 1e-3),  # [16, 16]
        ("adaptor.blocks.0.expand.weight", 2e-3),  # [24, 12]
    ):
        assert moved[name] == pytest.approx(0.2 * rate, rel=0.25), name
    assert moved["visual_projection.weight"] == pytest.approx(2e-3, rel=0.01), "AdamW's first step"


def take_step(model: Student, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    image, text, scale = model(torch.randn(3, 3, 16, 16), torch.randn(3, 12))
    (image * text).sum().mul(scale).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_moves_every_parameter_and_state_survives_saving(kind: str) -> None:
    model = student()
    options: dict[str, Any] = {"kind": kind, "learning_rate": 1e-3, "layer_decay": 0.9}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, **options)
    for seed in range(2):
        take_step(model, optimizer, seed)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if "k_proj.bias" not in name)

    other = student()
    other.load_state_dict(model.state_dict())
    again = build_optimizer(other, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # a file does not share tensors
    for seed in range(2):
        take_step(model, optimizer, seed)
        take_step(other, again, seed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_under_accelerate_a_loss_scaler_changes_nothing(kind: str) -> None:
    """Unscaling for the gradient norm and again by the step must happen once for every parameter."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    plain, scaled = student(), student()
    optimizer = build_optimizer(plain, kind=kind, learning_rate=1e-3)
    for seed in range(2):
        take_step(plain, optimizer, seed)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    model, optimizer = accelerator.prepare(scaled, build_optimizer(scaled, kind=kind, learning_rate=1e-3))
    for seed in range(2):
        torch.manual_seed(seed)
        image, text, scale = model(torch.randn(3, 3, 16, 16), torch.randn(3, 12))
        accelerator.backward((image * text).sum().mul(scale))
        accelerator.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()
    for (name, wanted), got in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        if "k_proj.bias" not in name:  # its gradient is rounding alone
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_in_fsdp2_shards_steps_are_the_same_and_go_on_from_a_checkpoint(kind: str, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, sharded, resumed = student(), student(), student()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        fully_shard(sharded)
        fully_shard(resumed)
        runs = [(model, build_optimizer(model, kind=kind, learning_rate=1e-3)) for model in (plain, sharded, resumed)]
        for seed in range(2):
            take_step(*runs[0], seed)
            take_step(*runs[1], seed)
        save_checkpoint(tmp_path, 2, state_tensors(sharded, [runs[1][1]]), {})
        restore_state(load_checkpoint(tmp_path)[0], resumed, [runs[2][1]])
        for run in runs:
            take_step(*run, 2)
        for (name, wanted), got in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            if "k_proj.bias" not in name:  # its gradient is rounding alone
                torch.testing.assert_close(got.full_tensor(), wanted, atol=1e-4 if kind == "muon" else 1e-6, rtol=1e-4)
        for got, wanted in zip(resumed.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(got.full_tensor(), wanted.full_tensor())
    finally:
        torch.distributed.destroy_process_group()


def test_the_schedule_by_hand_and_as_a_lambda() -> None:
    factors = [cosine_factor(step, 10, 2) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == 0
    assert all(a >= b for a, b in itertools.pairwise(factors[1:]))
    assert cosine_factor(3, 3) == 0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=4.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine_factor, total_steps=10, warmup_steps=2))
    assert schedule.get_last_lr() == [2.0]


def test_what_is_left_out_is_the_papers_and_torchs_fused_adamw() -> None:
    optimizer = build_optimizer(student())
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True
    assert {group["lr"] for group in optimizer.param_groups} == {1e-5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert cosine_factor(0, 4) == cosine_factor(0, 4, 1) == 1.0  # a warm-up of one step is none
    assert cosine_factor(1, 4) == pytest.approx((2 + 2**0.5) / 4) != cosine_factor(1, 4, 1)
    assert build_optimizer(student(), kind="muon").step() is None  # without a closure there is no loss to return


def test_a_module_that_is_the_model_itself_counts_as_one_inside_it() -> None:
    assert decays(torch.nn.Embedding(5, 3)) == set()
    assert decays(torch.nn.Linear(3, 3)) == {"weight"}
    blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(3)])  # blocks without a name before
    assert tower_learning_rates(blocks, layer_decay=0.5) == {"0.weight": 0.125, "1.weight": 0.25, "2.weight": 0.5}
