"""Every tower family: the tower alone and the image leg give the student's own vectors after saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from llm2clip import LLM2CLIP
from llm2clip.bundle import save_bundle
from llm2clip.export.check import PROBE_TEXTS, least_cosine, probe_images
from llm2clip.export.formats import tower
from llm2clip.student.start import open_transform, start_student
from llm2clip.student.transform import ImageTransform

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
PIXELS: dict[str, Any] = {"size": {"height": 32, "width": 32}}


def build(family: str) -> tuple[Any, Any]:
    """A random tower and its image processor."""
    match family:
        case "siglip":
            return t.SiglipVisionModel(t.SiglipVisionConfig(**SHAPE, image_size=32)), t.SiglipImageProcessor(**PIXELS)
        case "dinov2":
            processor = t.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
            return t.Dinov2Model(t.Dinov2Config(**SHAPE, image_size=32)), processor
        case "vit":  # its pooler is left out: the class token is read
            return t.ViTModel(t.ViTConfig(**SHAPE, image_size=32)), t.ViTImageProcessor(**PIXELS)
        case "metaclip_2":  # AutoModel lists the whole model alone
            return t.MetaClip2VisionModel(t.MetaClip2VisionConfig(**SHAPE, image_size=32)), t.SiglipImageProcessor(
                **PIXELS
            )
        case "resnet":  # pools to a 1 x 1 map
            config = t.ResNetConfig(hidden_sizes=[8, 32], depths=[1, 1], embedding_size=8)
            crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
            return t.ResNetModel(config), t.CLIPImageProcessor(**crop)
        case "timm":
            pytest.importorskip("timm")
            shape = {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4}
            config = t.TimmWrapperConfig(architecture="eva02_tiny_patch14_224", model_args=shape)
            size = {"size": {"height": 28, "width": 28}}
            return t.TimmWrapperModel(config), t.SiglipImageProcessor(**size)
    raise AssertionError(family)


def awaken(tower: Any) -> None:
    """Make a random tower answer to images: most start out giving nearly one vector for all."""
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)


@pytest.fixture(params=["siglip", "dinov2", "vit", "metaclip_2", "resnet", "timm"])
def model(request: pytest.FixtureRequest, finished_teacher: Path, tmp_path: Path) -> LLM2CLIP:
    from llm2clip.teacher.model import load_teacher

    torch.manual_seed(1)
    tower, processor = build(request.param)
    awaken(tower)
    tower.save_pretrained(tmp_path / "tower")
    processor.save_pretrained(tmp_path / "tower")
    student = start_student(str(tmp_path / "tower"), teacher_dim=32, projection_dim=24)
    transform = ImageTransform.from_processor(processor)
    return LLM2CLIP(student, transform, load_teacher(finished_teacher, device="cpu"))


def test_tower_and_bundle_are_the_model(model: LLM2CLIP, tmp_path: Path) -> None:
    expected = model.encode_image(probe_images())
    assert least_cosine(expected[:1].repeat(3, 0), expected[1:]) < 0.999, "all images look alike: nothing is shown"
    (tmp_path / "alone").mkdir()
    tower.write(model, tmp_path / "alone")
    facts = {"pooling": model.student.config.pooling}
    again = tower.reload(tmp_path / "alone", facts, torch.device("cpu"), True)
    assert least_cosine(tower.expect(model)["image"], again["image"]) > 0.9999
    texts = model.encode_text(PROBE_TEXTS)
    (tmp_path / "bundle").mkdir()
    save_bundle(tmp_path / "bundle", model.student, model.transform, model.teacher)
    from sentence_transformers import SentenceTransformer

    bundle = SentenceTransformer(str(tmp_path / "bundle"), trust_remote_code=True, device="cpu")
    assert least_cosine(expected, np.asarray(bundle.encode(probe_images()))) > 0.9999
    assert least_cosine(texts, np.asarray(bundle.encode(list(PROBE_TEXTS)))) > 0.9999
    opened = LLM2CLIP.from_pretrained(tmp_path / "bundle", device="cpu")
    assert least_cosine(expected, opened.encode_image(probe_images())) > 0.9999
    assert (tmp_path / "bundle" / "tower_module.py").exists() == isinstance(model.student.tower, t.MetaClip2VisionModel)


@pytest.mark.parametrize("model", ["timm"], indirect=True)
def test_a_timm_tower_alone_opens_plainly_and_with_tokens_as_hidden_states(
    model: LLM2CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "alone").mkdir()
    tower.write(model, tmp_path / "alone")
    plain = t.AutoModel.from_pretrained(tmp_path / "alone").eval()
    assert type(plain) is t.TimmWrapperModel
    tokens = t.AutoModel.from_pretrained(tmp_path / "alone", trust_remote_code=True).eval()
    pixels = torch.rand(2, 3, model.transform.image_size[0], model.transform.image_size[0])
    with torch.no_grad():
        inner, states = plain.timm_model, tokens(pixels).hidden_states
        wanted = inner.forward_features(pixels)  # the last block's tokens after the norm, class token first
        assert torch.allclose(inner.norm(states[-1]), wanted, atol=1e-5)
    assert [len(states), states[0].shape[2]] == [tokens.config.num_hidden_layers, tokens.config.hidden_size]
    assert states[0].shape[1] == (tokens.config.image_size // tokens.config.patch_size) ** 2 + inner.num_prefix_tokens


def test_a_tower_that_automodel_does_not_list_goes_on_from_a_bundle(
    finished_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved again, and on the way to another process; opened by us where nothing has told AutoModel of it."""
    import pickle

    from sentence_transformers import SentenceTransformer

    from llm2clip.teacher.model import load_teacher

    torch.manual_seed(1)
    tower, processor = build("metaclip_2")
    awaken(tower)
    for part in (tower, processor):
        part.save_pretrained(tmp_path / "tower")
    student = start_student(str(tmp_path / "tower"), teacher_dim=32, projection_dim=24).eval()
    transform = ImageTransform.from_processor(processor)
    (tmp_path / "bundle").mkdir()
    save_bundle(tmp_path / "bundle", student, transform, load_teacher(finished_teacher, device="cpu"))
    expected = LLM2CLIP(student, transform).encode_image(probe_images())
    bundle = SentenceTransformer(str(tmp_path / "bundle"), trust_remote_code=True, device="cpu")
    bundle.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    known = t.MODEL_MAPPING._extra_content
    monkeypatch.delitem(known, t.MetaClip2VisionConfig)
    opened = LLM2CLIP.from_pretrained(tmp_path / "bundle", device="cpu")
    assert least_cosine(expected, opened.encode_image(probe_images())) > 0.9999
    for folder in ("bundle", "again"):
        monkeypatch.delitem(known, t.MetaClip2VisionConfig)
        opened = SentenceTransformer(str(tmp_path / folder), trust_remote_code=True, device="cpu")
        assert least_cosine(expected, np.asarray(opened.encode(probe_images()))) > 0.9999
    module = pickle.loads(pickle.dumps(bundle[0].sub_modules["image"][0]))
    assert type(module).__name__ == "TowerModule"
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, student.tower.state_dict()[name])


@pytest.mark.parametrize("image_size", [28, 42])
def test_a_timm_tower_with_a_margin_of_an_odd_size_and_at_another_size(image_size: int, tmp_path: Path) -> None:
    """What timm's config says of images, and its processor does, gives way to what the student was trained with."""
    pytest.importorskip("timm")
    torch.manual_seed(1)
    arguments = {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4}
    pretrained = {"input_size": [3, 28, 28], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = t.TimmWrapperConfig(
        architecture="eva02_tiny_patch14_224",
        model_args=arguments,
        pretrained_cfg={**pretrained, "crop_mode": "center"},
    )
    original = t.TimmWrapperModel(config)
    awaken(original)
    original.save_pretrained(tmp_path / "timm")
    student = start_student(str(tmp_path / "timm"), teacher_dim=32, projection_dim=24, image_size=image_size)
    transform = open_transform(str(tmp_path / "timm"), image_size=image_size)
    assert transform.resize == {28: 31, 42: 46}[image_size], "an odd margin, and an even one"
    model = LLM2CLIP(student, transform)
    (tmp_path / "alone").mkdir()
    tower.write(model, tmp_path / "alone")
    again = tower.reload(tmp_path / "alone", {"pooling": student.config.pooling}, torch.device("cpu"), True)
    assert least_cosine(tower.expect(model)["image"], again["image"]) > 0.99999
    processor = t.AutoImageProcessor.from_pretrained(tmp_path / "alone")
    assert type(processor).__name__.startswith("CLIPImageProcessor")
    found = json.loads((tmp_path / "alone" / "config.json").read_text())["pretrained_cfg"]
    assert found["input_size"] == [3, image_size, image_size]
    assert open_transform(str(tmp_path / "alone")) == transform
