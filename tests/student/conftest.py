"""Tiny random towers of every family, built once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
FAMILIES = ("clip", "clip-vision", "siglip", "siglip-vision", "dinov2", "dinov3", "vit", "timm-eva02")


def build_family(name: str) -> object:
    """A random model of the family `name`."""
    import transformers as t

    short = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    match name:
        case "clip":
            text = t.CLIPTextConfig(**TEXT)
            vision = t.CLIPVisionConfig(**SHAPE)
            return t.CLIPModel(
                t.CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=16)
            )
        case "clip-vision":
            return t.CLIPVisionModel(t.CLIPVisionConfig(**SHAPE))
        case "siglip":
            text = t.SiglipTextConfig(**TEXT, max_position_embeddings=8, projection_size=32)
            vision = t.SiglipVisionConfig(**SHAPE)
            return t.SiglipModel(t.SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
        case "siglip-vision":
            return t.SiglipVisionModel(t.SiglipVisionConfig(**SHAPE))
        case "dinov2":
            return t.Dinov2Model(t.Dinov2Config(**short))
        case "dinov3":
            return t.DINOv3ViTModel(t.DINOv3ViTConfig(**SHAPE))
        case "vit":
            return t.ViTModel(t.ViTConfig(**SHAPE))
        case "timm-eva02":
            shape = {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4}
            return t.TimmWrapperModel(t.TimmWrapperConfig(architecture="eva02_tiny_patch14_224", model_args=shape))
    raise AssertionError(name)


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a tiny random tower by family; timm's is left out where timm is not installed."""
    import torch

    root = tmp_path_factory.mktemp("towers")
    folders = {}
    for name in FAMILIES:
        if name.startswith("timm"):
            try:
                import timm  # noqa: F401
            except ImportError:
                continue
        torch.manual_seed(0)
        build_family(name).save_pretrained(root / name)
        folders[name] = root / name
    return folders
