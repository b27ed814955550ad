"""examples/llava: a LLaVA of any tower family sees the tower's own features and opens without llm2clip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image

from examples.llava.make_llava import MakeConfig, make_llava
from llm2clip.errors import UsageError

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
EVA = {"img_size": 28, "depth": 3, "embed_dim": 48, "num_heads": 4}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov3": 5, "vit": 1, "eva02": 1, "timm_siglip": 0}
"""Class and register tokens."""


def build(family: str) -> Any:
    """A random tower, all of whose weights matter."""
    match family:
        case "clip":
            tower = t.CLIPVisionModel(t.CLIPVisionConfig(**SHAPE, image_size=32))
        case "siglip":
            tower = t.SiglipVisionModel(t.SiglipVisionConfig(**SHAPE, image_size=32))
        case "dinov2":
            tower = t.Dinov2Model(t.Dinov2Config(**SHAPE, image_size=32))
        case "dinov3":
            tower = t.DINOv3ViTModel(t.DINOv3ViTConfig(**SHAPE, image_size=32, num_register_tokens=4))
        case "vit":
            tower = t.ViTModel(t.ViTConfig(**SHAPE, image_size=32))
        case "eva02":
            pytest.importorskip("timm")
            tower = t.TimmWrapperModel(t.TimmWrapperConfig(architecture="eva02_tiny_patch14_224", model_args=EVA))
        case _:
            pytest.importorskip("timm")
            name, shape = "vit_base_patch16_siglip_224", {**EVA, "img_size": 32}
            tower = t.TimmWrapperModel(t.TimmWrapperConfig(architecture=name, model_args=shape))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.eval()


def save_tower(family: str, folder: Path) -> Any:
    torch.manual_seed(1)
    tower = build(family)
    tower.save_pretrained(folder)
    size = 28 if family == "eva02" else 32
    square = {"height": size, "width": size}
    t.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, image_std=[0.3, 0.4, 0.5]).save_pretrained(
        folder
    )
    return tower


def own_states(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The hidden states before the last block, without class token, by the family's own class."""
    with torch.no_grad():
        state = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


@pytest.fixture(scope="module")
def made(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes a family's LLaVA once: the tower, the folder."""
    done: dict[str, tuple[Any, Path]] = {}

    def make(family: str) -> tuple[Any, Path]:
        if family not in done:
            folder = tmp_path_factory.mktemp(family)
            tower = save_tower(family, folder / "tower")
            settings = {"tower": str(folder / "tower"), "llm": str(tiny_llm), "template": "vicuna"}
            done[family] = tower, make_llava(MakeConfig(**settings, out=folder / "llava"))
        return done[family]

    return make


def example(processor: Any) -> Any:
    """A wide image with a question."""
    image = Image.linear_gradient("L").convert("RGB").resize((60, 40))
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    return processor(text=[text], images=[image], return_tensors="pt")


@pytest.mark.parametrize("family", PREFIX)
def test_a_llava_sees_the_towers_own_features(family: str, made: Any) -> None:
    tower, folder = made(family)
    model = t.AutoModelForImageTextToText.from_pretrained(folder).eval()
    batch = example(t.AutoProcessor.from_pretrained(folder))
    size, num_patches = (28 if family == "eva02" else 32), (4 if "eva02" in family or "timm" in family else 16)
    assert batch["pixel_values"].shape == (1, 3, size, size)
    own = own_states(tower, batch["pixel_values"])
    if PREFIX[family] and own.shape[1] > num_patches:
        own = own[:, 1:]
    assert own.shape[1] == num_patches + max(0, PREFIX[family] - 1)
    with torch.no_grad():
        seen = model.model.get_image_features(batch["pixel_values"]).pooler_output[0]
        wanted = model.model.multi_modal_projector(own)[0]
        assert model(**batch).logits.isfinite().all()
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-5)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == len(seen) == model.config.image_seq_length


REOPENED = """
import sys, torch
sys.modules["llm2clip"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    trusted = {"trust_remote_code": True} if "eva02" in folder or "timm" in folder else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, **trusted).eval()
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    batch = torch.load(f"{folder}/batch.pt")
    text = processor.tokenizer.apply_chat_template([{"role": "user", "content": "<image>"}], tokenize=False)
    with torch.no_grad():
        torch.save((model(**batch).logits, text), f"{folder}/found.pt")
"""


@pytest.mark.ci
def test_every_family_opens_in_a_fresh_process_without_llm2clip(made: Any, tmp_path: Path) -> None:
    """Plainly, but for timm's towers, which need `trust_remote_code=True` there."""
    folders = {family: made(family)[1] for family in PREFIX}
    for folder in folders.values():
        batch = dict(example(t.AutoProcessor.from_pretrained(folder)))
        torch.save(batch, folder / "batch.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", REOPENED, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder in folders.values():
        model = t.AutoModelForImageTextToText.from_pretrained(folder).eval()
        with torch.no_grad():
            wanted = model(**torch.load(folder / "batch.pt")).logits
        found, text = torch.load(folder / "found.pt")
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert text.count("<image>") == 1 and text.startswith("A chat between a curious user")


def test_two_images_and_an_image_token_inside_a_text(made: Any) -> None:
    """As many features as images; a user who writes <image> has no image in that."""
    folder = made("clip")[1]
    model = t.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = t.AutoProcessor.from_pretrained(folder)
    images = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue")]
    parts = [{"type": "image"}, {"type": "text", "text": "what does <image> mean"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    assert "USER: <image>\n<image>\nwhat does < image > mean ASSISTANT:" in text
    batch = processor(text=[text], images=images, return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 32
    with torch.no_grad():
        logits = model(**batch).logits
        swapped = model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)}).logits
    assert (logits - swapped).abs().max() > 1e-4


def test_an_image_is_padded_to_a_square_with_its_mean_colour(made: Any) -> None:
    processor = t.AutoProcessor.from_pretrained(made("clip")[1])
    pixels = processor.image_processor(Image.new("RGB", (64, 32), "white"), return_tensors="pt")["pixel_values"][0]
    assert pixels[:, :6].abs().max() < 0.02 and pixels[:, 26:].abs().max() < 0.02  # the mean is 0 there
    assert pixels[:, 10:22].min() > 0.9


def test_the_llms_own_template_and_words(tiny_llm: Path, made: Any, tmp_path: Path) -> None:
    """A template that joins strings, as most do, gets strings; an LLM whose table is full grows by one row."""
    llm, tokenizer = t.AutoModelForCausalLM.from_pretrained(tiny_llm), t.AutoTokenizer.from_pretrained(tiny_llm)
    llm.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] + ' ' + message['content'] | trim + '.' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    tower = str(made("clip")[1].parent / "tower")
    folder = make_llava(MakeConfig(tower=tower, llm=str(tmp_path / "llm"), out=tmp_path / "out"))
    model = t.AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.image_token_id == len(tokenizer) == model.lm_head.weight.shape[0] - 1
    processor = t.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}], add_generation_prompt=True
    )
    assert text == "user <image>\nhi.assistant "  # the tokenizer begins it with <s>, and nobody else
    assert processor.tokenizer(text)["input_ids"][:2] == [1, tokenizer("user")["input_ids"][1]]
    ids = torch.tensor([[1, 7, 9]])
    with torch.no_grad():
        found, own = model(input_ids=ids).logits, llm(input_ids=ids).logits
    torch.testing.assert_close(found[..., :-1], own)


def test_another_image_size(made: Any, tiny_llm: Path, tmp_path: Path) -> None:
    tower = str(made("clip")[1].parent / "tower")
    settings = {"tower": tower, "llm": str(tiny_llm), "template": "vicuna", "out": tmp_path / "out"}
    folder = make_llava(MakeConfig(**settings, image_size=48))
    batch = example(t.AutoProcessor.from_pretrained(folder))
    assert batch["pixel_values"].shape == (1, 3, 48, 48)
    model = t.AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.image_seq_length == 36 and model(**batch).logits.isfinite().all()


def test_what_cannot_be_is_one_line(made: Any, tiny_llm: Path, tmp_path: Path) -> None:
    folder = made("clip")[1]
    right = {"tower": str(folder.parent / "tower"), "llm": str(tiny_llm), "template": "vicuna", "out": tmp_path / "out"}
    (tmp_path / "empty").mkdir()
    resnet = t.ResNetModel(t.ResNetConfig(hidden_sizes=[8, 32], depths=[1, 1], embedding_size=8))
    resnet.save_pretrained(tmp_path / "resnet")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    metaclip = t.MetaClip2VisionModel(t.MetaClip2VisionConfig(**small, image_size=32, patch_size=8))
    metaclip.save_pretrained(tmp_path / "metaclip")
    t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "metaclip"
    )
    capped = t.Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.1,
    )  # fmt: skip
    t.Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "capped")
    t.AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path / "capped")
    for changed, said in [
        ({"tower": str(tmp_path / "nowhere")}, "tower .*nowhere is no folder"),
        ({"tower": str(tmp_path / "empty")}, "is no vision model: no config.json"),
        ({"tower": str(tiny_llm)}, "is no vision model .*llama"),
        ({"tower": str(tmp_path / "metaclip")}, "AutoModel lists no metaclip_2_vision_model"),
        ({"tower": str(tmp_path / "resnet")}, "resnet gives maps, no tokens; take a ViT"),
        ({"llm": right["tower"]}, "llm .* cannot be used"),
        ({"template": None}, "has no chat template; add template='vicuna'"),
        ({"template": "vicunia"}, "template vicunia is no file; give vicuna"),
        ({"image_size": 50}, "image_size 50 is no multiple of the patch size 8; use 48 or 56"),
        ({"layer": -9}, "layer -9: the tower has 4 hidden states; give -2"),
        ({"layer": 1}, "layer 1: it counts from the last"),
        ({"llm": str(tmp_path / "capped")}, "Gemma2ForCausalLM computes its logits in a way that a LLaVA does not"),
    ]:
        with pytest.raises(UsageError, match=said) as caught:
            make_llava(MakeConfig(**{**right, **changed}))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "config.json").exists()
