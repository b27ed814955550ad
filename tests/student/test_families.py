"""Families of towers that are unlike most: their own pooled vectors, another image size, batch statistics, refusals."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from llm2clip.errors import UsageError
from llm2clip.student.model import Student
from llm2clip.student.start import start_student
from llm2clip.student.tower import build_tower, load_options, resample_positions, resize_tower
from llm2clip.student.trainable import choose_what_learns

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
PAIR = {"vision_config": SHAPE, "text_config": TEXT | {"project_dim": 16}, "projection_dim": 16}
PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
NARROW = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
CONVOLUTIONS = {
    "resnet": NARROW,
    "regnet": {**NARROW, "groups_width": 8},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 32},
}


def make(folder: Path, kind: str, **settings: Any) -> Any:
    """A saved model of random weights, none of them zero."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def start(folder: Path, **options: Any) -> Student:
    return start_student(str(folder), teacher_dim=8, projection_dim=4, **options).eval()


@torch.no_grad()
def pooled(student: Student, images: torch.Tensor) -> torch.Tensor:
    """The tower's vectors, before the projection."""
    seen = []
    hook = student.visual_projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    student.get_image_features(images)
    hook.remove()
    return seen[0]


def images(side: int = 32) -> torch.Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("beit", SHAPE),
        ("beit", SHAPE | {"use_mean_pooling": False}),
        ("beit", SHAPE | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}),
        ("siglip_vision_model", SHAPE),
        ("dinov2_with_registers", SHAPE),
        ("resnet", NARROW),
    ],
)
def test_the_vector_is_the_class_s_own_pooled_output(kind: str, settings: Any, tmp_path: Path) -> None:
    whole = make(tmp_path, kind, **settings)
    torch.testing.assert_close(pooled(start(tmp_path), images()), whole(images()).pooler_output.flatten(1))


@pytest.mark.parametrize("kind", ["metaclip_2", "altclip", "clipseg"])
def test_the_vision_half_of_a_pair_that_automodel_lists_whole(kind: str, tmp_path: Path) -> None:
    whole = make(tmp_path / kind, kind, **PAIR)
    student = start(tmp_path / kind)
    right = whole.vision_model(pixel_values=images()).pooler_output
    torch.testing.assert_close(pooled(student, images()), right)
    student.save_pretrained(tmp_path / "student")
    torch.testing.assert_close(pooled(Student.from_pretrained(tmp_path / "student").eval(), images()), right)


@pytest.mark.ci
def test_a_pair_of_random_weights_opens_without_llm2clip(tmp_path: Path) -> None:
    make(tmp_path / "tower", "metaclip_2", **PAIR)
    start(tmp_path / "tower").save_pretrained(tmp_path / "student")
    code = "import sys; sys.modules['llm2clip'] = None; from transformers import AutoModel as A;"
    code += f"A.from_pretrained({str(tmp_path / 'student')!r}, trust_remote_code=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("normed", [True, False])
def test_data2vec_has_the_pooler_of_its_classifier(normed: bool, tmp_path: Path) -> None:
    """A normed mean of the patches; a checkpoint without that norm starts it at ones and zeros."""
    from transformers import Data2VecVisionConfig, Data2VecVisionModel

    torch.manual_seed(0)
    whole = Data2VecVisionModel(Data2VecVisionConfig(**SHAPE), add_pooling_layer=normed).eval()
    norm = torch.nn.LayerNorm(32, eps=whole.config.layer_norm_eps)
    if normed:
        torch.nn.init.normal_(whole.pooler.layernorm.weight)
        norm = whole.pooler.layernorm
    whole.save_pretrained(tmp_path / "tower")
    student = start(tmp_path / "tower")
    right = norm(whole(images()).last_hidden_state[:, 1:].mean(dim=1))
    torch.testing.assert_close(pooled(student, images()), right)
    student.save_pretrained(tmp_path / "student")
    torch.testing.assert_close(pooled(Student.from_pretrained(tmp_path / "student").eval(), images()), right)
    assert load_options(Data2VecVisionModel, "pooler") == {"add_pooling_layer": True}  # for its export


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("siglip_vision_model", SHAPE | {"vision_use_head": False}),  # as their image classifiers pool
        ("ijepa", SHAPE),
        ("segformer", PYRAMID | {"num_attention_heads": [1, 1, 2, 2]}),
        ("pvt_v2", PYRAMID | {"num_attention_heads": [1, 1, 2, 2]}),
    ],
)
def test_without_pooler_and_class_token_it_is_the_mean(kind: str, settings: Any, tmp_path: Path) -> None:
    whole = make(tmp_path, kind, **settings)
    student = start(tmp_path, image_size=32)
    hidden = whole(images()).last_hidden_state
    right = hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden.mean(dim=1)
    torch.testing.assert_close(pooled(student, images()), right)


def test_a_masked_autoencoder_sees_every_patch(tmp_path: Path) -> None:
    """With its weights a plain ViT gives the same class token."""
    from transformers import ViTConfig, ViTModel

    whole = make(tmp_path / "tower", "vit_mae", **SHAPE)
    plain = ViTModel(ViTConfig(**SHAPE, layer_norm_eps=whole.config.layer_norm_eps), add_pooling_layer=False).eval()
    plain.load_state_dict(whole.state_dict())
    right = plain(images()).last_hidden_state[:, 0]
    student = start(tmp_path / "tower")
    torch.testing.assert_close(pooled(student, images()), right, rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled(student.train(), images()), pooled(student.eval(), images()))
    student.save_pretrained(tmp_path / "student")
    again = Student.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(pooled(again, images()), pooled(student, images()))
    assert start(tmp_path / "tower", init="random").tower.config.mask_ratio == 0


def test_a_tower_that_draws_random_numbers_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.clip.modeling_clip import CLIPMLP

    make(tmp_path, "clip_vision_model", **SHAPE)
    monkeypatch.setattr(CLIPMLP, "forward", lambda self, x: torch.nn.functional.dropout(self.fc2(self.fc1(x)), 0.5))
    with pytest.raises(UsageError, match="another vector each time"):
        start(tmp_path)


@pytest.mark.parametrize("kind", ["beit", "data2vec-vision"])
@pytest.mark.parametrize("option", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_distances_to_the_class_token_stay_with_another_image_size(kind: str, option: str) -> None:
    tower = build_tower(AutoConfig.for_model(kind, **SHAPE, **{option: True}), pooling="pooler")
    tables = {name: table for name, table in tower.state_dict().items() if name.endswith("position_bias_table")}
    assert tables
    for table in tables.values():  # a plane over the 7 x 7 distances, and three rows of the class token
        table.copy_(torch.cat([torch.arange(7.0).repeat(7), torch.tensor([90.0, 91, 92])])[:, None].expand_as(table))
    larger = resize_tower(tower, image_size=64).state_dict()
    for name in tables:
        found = larger[name][:, 0]
        assert len(found) == 15 * 15 + 3 and found[-3:].tolist() == [90, 91, 92]
        grid = found[:-3].view(15, 15)
        torch.testing.assert_close(grid, grid[:1].expand_as(grid))
        torch.testing.assert_close(grid[0, 7], torch.tensor(3.0))  # the middle, distance 0
        torch.testing.assert_close(grid[0] + grid[0].flip(0), torch.full((15,), 6.0))
        assert (grid[0, 1:-1].diff() > 0).all()


def test_rows_that_are_no_grid_are_an_error() -> None:
    with pytest.raises(ValueError, match="no square grid"):
        resample_positions(torch.zeros(2, 4), torch.Size([3, 4]))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_locked_tower_does_not_move(kind: str, tmp_path: Path) -> None:
    make(tmp_path, kind, **CONVOLUTIONS[kind])
    student = start(tmp_path, image_size=32)
    choose_what_learns(student, unlocked_blocks=0)
    before = {name: value.clone() for name, value in student.tower.state_dict().items()}
    student.train().get_image_features(images())
    assert all(torch.equal(value, before[name]) for name, value in student.tower.state_dict().items())
    assert student.training and student.adaptor.training


def test_norms_that_learn_follow_the_images_and_locked_ones_do_not(tmp_path: Path) -> None:
    make(tmp_path, "resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 3])
    student = start(tmp_path, image_size=32)
    choose_what_learns(student, unlocked_blocks=1)
    before = {name: value.clone() for name, value in student.tower.state_dict().items()}
    student.train().get_image_features(images())
    moved = {name for name, value in student.tower.state_dict().items() if not torch.equal(value, before[name])}
    learns = {name.rpartition(".")[0] for name, p in student.tower.named_parameters() if p.requires_grad}
    assert moved and {name.rpartition(".")[0] for name in moved} <= learns
    student.tower.requires_grad_(True)
    student.train()
    assert all(module.training for module in student.modules())


@pytest.mark.parametrize(("kind", "said"), [("resnet", True), ("regnet", True), ("convnext", False)])
def test_batch_statistics_that_learn_are_said_once(
    kind: str, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, kind, **CONVOLUTIONS.get(kind, {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}))
    with caplog.at_level(logging.INFO, logger="llm2clip"):
        choose_what_learns(start(tmp_path, image_size=32))
        assert sum("BatchNorm" in record.message for record in caplog.records) == said
        caplog.clear()
        choose_what_learns(start(tmp_path, image_size=32), unlocked_blocks=0)
        assert not any("BatchNorm" in record.message for record in caplog.records)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_adapters_need_linear_layers(kind: str, tmp_path: Path) -> None:
    make(tmp_path, kind, **CONVOLUTIONS[kind])
    student = start(tmp_path, image_size=32).train()
    with pytest.raises(UsageError, match=rf"lora_rank 2: a {kind} tower has no linear layers.*unlocked_blocks"):
        choose_what_learns(student, lora_rank=2)


def test_naflex_is_no_baseline_in_the_words_of_training(tmp_path: Path) -> None:
    from llm2clip.hub import find_model
    from llm2clip.opening import check_images_fit

    for settings in (
        {"model_type": "siglip2"},
        {"model_type": "x", "vision_config": {"model_type": "siglip2_vision_model"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UsageError, match="fixed resolution"):
            check_images_fit(find_model(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    check_images_fit(find_model(tmp_path))


@pytest.mark.ci
def test_processes_of_torchrun_see_each_other_without_a_gpu(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("a GPU is there")
    (tmp_path / "rank.py").write_text(
        "import sys\nfrom llm2clip.student.accelerator import start_accelerator\n"
        "from llm2clip.student.config import StudentConfig\n"
        "a = start_accelerator(StudentConfig(bank=('b',), tower='t', out='o', tracker='none', precision='fp32'))\n"
        "a.wait_for_everyone()\n"
        "open(f'{sys.argv[1]}/{a.process_index}-of-{a.num_processes}', 'w')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, tmp_path / "rank.py", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.glob("*-of-*")} == {"0-of-2", "1-of-2"}
