"""The student: every family round trip, uint8 images, loading without llm2clip, the temperature."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from llm2clip.student.model import CLIP_MEAN, CLIP_STD, Student
from llm2clip.student.start import start_student
from llm2clip.student.trainable import add_lora, choose_what_learns, lock_tower, merge_lora

FAMILIES = ("clip", "clip-vision", "siglip", "siglip-vision", "dinov2", "dinov3", "vit", "timm-eva02")


def start(folder, **options) -> Student:
    torch.manual_seed(0)
    return start_student(str(folder), teacher_dim=24, projection_dim=20, **options).eval()


def inputs(student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = student.config.image_size
    return torch.rand(3, 3, size, size, generator=generator), torch.randn(3, 24, generator=generator)


@pytest.mark.parametrize("size", [None, 56])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_student_is_the_same(towers, family, size, tmp_path) -> None:
    if family not in towers:
        pytest.skip("timm is not installed")
    student = start(towers[family], image_size=size)
    assert size is None or student.config.image_size == size
    image, text, scale = student(*inputs(student))
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    assert scale.shape == () and scale.item() == pytest.approx(1 / 0.07)
    student.save_pretrained(tmp_path)
    again = Student.from_pretrained(tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip((image, text, scale), again(*inputs(student)), strict=True))
    assert str(towers[family]) not in (tmp_path / "config.json").read_text(), "a path of this machine is left in it"


@pytest.mark.parametrize("family", FAMILIES)
def test_pretrained_tower_and_every_parameter_learns(towers, family) -> None:
    if family not in towers:
        pytest.skip("timm is not installed")
    from transformers import AutoModel

    student = start(towers[family])
    original = AutoModel.from_pretrained(towers[family])
    original = getattr(original, "vision_model", original).state_dict()
    kept = student.tower.state_dict()
    assert kept and all(torch.equal(value, original[name]) for name, value in kept.items())
    image, text, scale = student.train()(*inputs(student))
    ((image @ text.T * scale)[0, 1] + (image @ text.T).square().sum()).backward()
    # A key's bias shifts all scores of a query alike, so its gradient is zero but there.
    assert [n for n, p in student.named_parameters() if p.grad is None and "mask_token" not in n] == []


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"unlocked_blocks": 1}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_should_learn_gets_a_gradient(towers, family, options) -> None:
    """Data-parallel training waits for the gradient of every parameter that learns: DINOv2's mask token has none."""
    if family not in towers:
        pytest.skip("timm is not installed")
    student = start(towers[family]).train()
    choose_what_learns(student, **options)
    image, text, scale = student(*inputs(student))
    (scale * (image @ text.T).square().sum()).backward()
    assert student.training
    assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []
    learns = {n for n, p in student.tower.named_parameters() if p.requires_grad}
    assert learns and not any("mask_token" in name for name in learns)


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp_shards_blocks_that_are_there(towers, family) -> None:
    """accelerate looks for each of these classes, and stops at one that it does not find."""
    if family not in towers:
        pytest.skip("timm is not installed")
    student = start(towers[family])
    units = {type(module).__name__ for module in student.modules()} & set(student._no_split_modules)
    assert units == set(student._no_split_modules) and len(units) == 2 and "AdaptorBlock" in units
    assert student.get_input_embeddings() is None


def test_uint8_images_are_normalised_as_the_processor_does(tiny_tower) -> None:
    from PIL import Image
    from transformers import CLIPImageProcessor

    student = start(tiny_tower)
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    processor = CLIPImageProcessor.from_pretrained(tiny_tower)
    pixels = processor(Image.fromarray(rgb), return_tensors="pt")["pixel_values"]
    as_bytes = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    torch.testing.assert_close(student.get_image_features(as_bytes), student.get_image_features(pixels))
    assert tuple(student.config.image_mean) == CLIP_MEAN and tuple(student.config.image_std) == CLIP_STD


@pytest.mark.ci
def test_loads_without_llm2clip(towers, tmp_path) -> None:
    student = start(towers["clip"])
    student.save_pretrained(tmp_path)
    pixels, embeds = inputs(student)
    torch.save({"pixels": pixels, "embeds": embeds}, tmp_path / "inputs.pt")
    code = f"""
import sys, json
sys.modules["llm2clip"] = None  # as if it were not installed
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
inputs = torch.load({str(tmp_path / "inputs.pt")!r}, weights_only=True)
image, text, scale = model(inputs["pixels"], inputs["embeds"])
print(json.dumps([image.tolist(), text.tolist(), scale.item()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    image, text, scale = json.loads(done.stdout.splitlines()[-1])
    expected = student(pixels, embeds)
    torch.testing.assert_close(torch.tensor(image), expected[0])
    torch.testing.assert_close(torch.tensor(text), expected[1])
    assert scale == pytest.approx(expected[2].item())


def test_auto_model_knows_it_after_import(towers, tmp_path) -> None:
    from transformers import AutoModel

    start(towers["clip"]).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is Student


def test_temperature_stays_in_its_bounds(tiny_tower) -> None:
    student = start(tiny_tower)
    for wild, bound in ((9.0, math.log(100)), (-3.0, 0.0)):
        with torch.no_grad():
            student.logit_scale.fill_(wild)
        student.clamp_logit_scale()
        assert student.logit_scale.item() == pytest.approx(bound)


def test_vectors_have_length_one_in_half_precision_too(tiny_tower) -> None:
    student = start(tiny_tower)
    with torch.autocast("cpu", torch.bfloat16):
        image, text, scale = student(*inputs(student))
    assert image.dtype == text.dtype == scale.dtype == torch.float32
    for vectors in (image, text):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)


def test_fresh_parts_start_as_in_the_released_code(tiny_tower) -> None:
    """CLIP's normal projection, of standard deviation W ** -0.5; PyTorch's uniform linear layers; plain norms."""
    torch.manual_seed(0)
    student = start_student(str(tiny_tower), teacher_dim=100, projection_dim=400)
    projection = student.visual_projection.weight
    assert projection.std().item() * 32**0.5 == pytest.approx(1, abs=0.02)
    assert projection.abs().max() > 3 * 32**-0.5, "a uniform one has no such values"
    linear = [module for module in student.adaptor.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * 4 + 1
    for module in linear:
        bound = module.in_features**-0.5
        for values in (module.weight, module.bias):
            assert 0.95 * bound < values.abs().max() <= bound
            assert values.abs().mean().item() == pytest.approx(bound / 2, rel=0.15)
    for module in student.adaptor.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_sigmoid_student_has_a_bias(tiny_tower, tmp_path) -> None:
    student = start(tiny_tower, loss="sigmoid")
    assert student.logit_bias.item() == -10 and student.logit_scale.exp().item() == pytest.approx(10)
    student.save_pretrained(tmp_path)
    assert Student.from_pretrained(tmp_path).logit_bias.item() == -10
    assert start(tiny_tower).logit_bias is None


def test_random_init_needs_only_a_config(tiny_tower, tmp_path) -> None:
    (tmp_path / "config.json").write_text((tiny_tower / "config.json").read_text())
    a, b = start(tmp_path, init="random"), start(tiny_tower)
    assert a.tower.state_dict().keys() == b.tower.state_dict().keys()
    name = "embeddings.patch_embedding.weight"
    assert not torch.equal(a.tower.state_dict()[name], b.tower.state_dict()[name])


def test_lora_merges_into_a_plain_tower(towers) -> None:
    for family in towers:
        student = start(towers[family])
        names = student.state_dict().keys()
        pixels, embeds = inputs(student)
        adapters = add_lora(student, rank=4, alpha=8)
        trained = [name for name, p in student.tower.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name for name in trained)
        for name, parameter in student.tower.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        before = student(pixels, embeds)[0]
        merge_lora(student, adapters)
        torch.testing.assert_close(student(pixels, embeds)[0], before)
        assert student.state_dict().keys() == names


def test_locked_tower_trains_its_last_blocks_and_what_follows(towers) -> None:
    from llm2clip.errors import UsageError

    for family, after in (("clip-vision", "post_layernorm"), ("siglip-vision", "head"), ("dinov2", "layernorm")):
        student = start(towers[family])
        lock_tower(student, unlocked_blocks=1)
        learning = {name for name, p in student.tower.named_parameters() if p.requires_grad}
        assert any(name.startswith(after) for name in learning)
        assert not any("embeddings" in name or ".0." in name for name in learning)
        assert student.visual_projection.weight.requires_grad
        lock_tower(student, unlocked_blocks=0)
        assert not any(p.requires_grad for p in student.tower.parameters())
        with pytest.raises(UsageError, match="has 2 blocks"):
            lock_tower(student, unlocked_blocks=3)
