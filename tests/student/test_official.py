"""Released students: every layout gives what plain torch makes of its weights, and damage is one clear line."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from llm2clip import LLM2CLIP
from llm2clip import released as table
from llm2clip.errors import LLM2CLIPError, UsageError
from llm2clip.hub import find_model
from llm2clip.student.official import open_released
from llm2clip.student.start import open_transform, start_student
from tests.student import released as small

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _needs_timm(request: pytest.FixtureRequest) -> None:
    """What has a tower of timm's is skipped without it."""
    if "layout" in request.fixturenames and request.getfixturevalue("layout") != "openai":
        pytest.importorskip("timm")


def as_it_is(weights: Weights) -> Weights:
    return weights


def with_rope_tables(weights: Weights) -> Weights:
    cosines, sines = small.rope_tables()
    tables = {"freqs_cos": cosines, "freqs_sin": sines}
    more = {f"visual.rope.{name}": value for name, value in tables.items()}
    more |= {f"visual.blocks.{i}.attn.rope.{name}": value for i in range(2) for name, value in tables.items()}
    return {**weights, **more}


def with_old_biases(weights: Weights) -> Weights:
    return {
        name.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias"): value for name, value in weights.items()
    }


def with_other_names(weights: Weights) -> Weights:
    """Of a block's parts in transformers' format the names were never seen."""
    new = {".ln.": ".norm.", ".fn.0.": ".up.", ".fn.3.": ".down."}
    for old, other in new.items():
        weights = {name.replace(old, other): value for name, value in weights.items()}
    return weights


def wrapped(weights: Weights) -> Any:
    return {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}


def with_its_llm(weights: Weights) -> Weights:
    return {**weights, "text.text.model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}


VARIANTS: list[tuple[str, str | None, Callable[[Weights], Any]]] = [
    ("openai", None, as_it_is),
    ("openai", "pytorch_model.bin", as_it_is),
    ("openai", None, with_other_names),
    ("eva02", None, as_it_is),
    ("eva02", None, with_rope_tables),
    ("eva02", None, with_old_biases),
    ("eva02", None, wrapped),
    ("siglip2", None, as_it_is),
    ("siglip2", None, with_its_llm),
]


def draws(layout: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [4, H, W, 3] and teacher vectors [5, T]."""
    source, size = torch.Generator().manual_seed(7), small.SIZE[layout]
    images = torch.randint(0, 256, (4, size, size, 3), generator=source, dtype=torch.uint8)
    return images, 3 * torch.randn(5, small.T, generator=source)


def text_of(model: LLM2CLIP, vectors: Tensor) -> Tensor:
    with torch.inference_mode():
        return normalize(model.student.get_text_features(vectors), dim=-1)


def check(model: LLM2CLIP, layout: str, weights: Weights) -> None:
    """Images, texts and scale are those of the plain code, and no two images or texts are alike."""
    images, vectors = draws(layout)
    image, text = small.expected(layout, weights, images, vectors)
    found = torch.from_numpy(model.encode_image(list(images.numpy())))
    assert cosine_similarity(found, image).min() > 0.99999
    assert cosine_similarity(text_of(model, vectors), text).min() > 0.99999
    assert model.student.logit_scale.item() == pytest.approx(3.7)
    for vectors in (image, text):
        assert cosine_similarity(vectors[:1], vectors[1:]).max() < 0.99, "all look alike: nothing is shown"


@pytest.mark.parametrize(("layout", "file", "change"), VARIANTS)
def test_vectors_are_those_of_plain_torch(
    layout: str, file: str | None, change: Callable[[Weights], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = small.MADE[layout]()
    with caplog.at_level(logging.INFO, logger="llm2clip"):
        model = LLM2CLIP.from_pretrained(
            small.write_checkpoint(tmp_path, layout, change(dict(weights)), file=file), device="cpu"
        )
    check(model, layout, weights)
    assert ("left out: text" in caplog.text) == (change is with_its_llm)


def test_a_projection_without_bias(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    weights = small.eva02()
    del weights["visual.head.bias"]
    check(
        LLM2CLIP.from_pretrained(small.write_checkpoint(tmp_path, "eva02", dict(weights)), device="cpu"),
        "eva02",
        weights,
    )


def change_one(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Weights], Weights]:
    def changed(weights: Weights) -> Weights:
        value = change(weights.pop(name))
        return weights if value is None else {**weights, name: value}

    return changed


DAMAGE: list[tuple[str, Callable[[Weights], Any], str]] = [
    (
        "openai",
        change_one("text_adapter.adaptor.5.weight", lambda _: None),
        r"lacks .* text_adapter\.adaptor\.5\.weight",
    ),
    (
        "openai",
        change_one("text_adapter.adaptor.2.ln.bias", lambda _: None),
        r"lacks .* text_adapter\.adaptor\.2\.ln\.bias",
    ),
    ("openai", change_one("logit_scale", lambda _: None), "lacks .* logit_scale"),
    (
        "openai",
        change_one("vision_model.post_layernorm.bias", lambda _: None),
        "lacks .* vision_model.post_layernorm.bias",
    ),
    (
        "openai",
        change_one("vision_model.post_layernorm.bias", lambda x: x[:-1]),
        r"post_layernorm\.bias is \[31\], exp",
    ),
    (
        "openai",
        change_one("text_adapter.adaptor.1.fn.3.weight", lambda x: x[:, 1:]),
        r"\.fn\.3\.weight is \[32, 63\], exp",
    ),
    (
        "openai",
        lambda weights: {**weights, "text_adapter.adaptor.6.weight": torch.zeros(2)},
        "such as text_adapter.adaptor.6",
    ),
    (
        "openai",
        lambda weights: {**weights, "visual_projection.bias": torch.zeros(small.D)},
        "such as visual_projection.bias",
    ),
    ("openai", lambda weights: {n: w for n, w in weights.items() if "adaptor" not in n}, "holds the image half alone"),
    ("eva02", change_one("visual.cls_token", lambda _: None), "lacks .* visual.cls_token"),
    ("eva02", change_one("visual.pos_embed", lambda _: None), "lacks .* visual.pos_embed"),
    (
        "eva02",
        change_one("visual.blocks.1.mlp.w3.weight", lambda x: x[1:]),
        r"w3\.weight is \[127, 341\], expected \[128, 341\]",
    ),
    (
        "eva02",
        lambda weights: {**weights, "visual.blocks.0.mlp.w4.weight": torch.zeros(2)},
        r"such as visual\.blocks\.0\.mlp\.w4",
    ),
    ("eva02", lambda weights: {"step": 3, **weights}, "holds other things than named tensors"),
    (
        "eva02",
        lambda weights: {"something.else": torch.zeros(2)},
        "is no released student: its weights are named something",
    ),
    (
        "siglip2",
        change_one("visual.trunk.attn_pool.latent", lambda _: None),
        r"lacks .* visual\.trunk\.attn_pool\.latent",
    ),
]


@pytest.mark.parametrize(("layout", "change", "words"), DAMAGE, ids=[row[2] for row in DAMAGE])
def test_damage_is_one_clear_line(layout: str, change: Callable[[Weights], Any], words: str, tmp_path: Path) -> None:
    folder = small.write_checkpoint(tmp_path, layout, change(dict(small.MADE[layout]())))
    with pytest.raises(LLM2CLIPError, match=words) as error:
        LLM2CLIP.from_pretrained(folder)
    assert "\n" not in str(error.value) and folder.name in str(error.value)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_files_that_are_cut_or_would_run_code(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = small.write_checkpoint(tmp_path, "openai", file=file)
    whole = (folder / file).read_bytes()
    for part in (whole[: len(whole) // 2], b""):
        (folder / file).write_bytes(part)
        with pytest.raises(LLM2CLIPError, match=r"cannot be read|or is damaged") as error:
            LLM2CLIP.from_pretrained(folder)
        assert "\n" not in str(error.value)
    if file.endswith(".bin"):
        for save in (
            lambda: torch.save({"x": Evil()}, folder / file),
            lambda: (folder / file).write_bytes(pickle.dumps(Evil())),
        ):
            save()
            with pytest.raises(LLM2CLIPError, match="more than tensors"):
                LLM2CLIP.from_pretrained(folder)
        assert not Path("ran").exists()


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = small.write_checkpoint(tmp_path, "openai")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LLM2CLIPError, match="holds no weights"):
        LLM2CLIP.from_pretrained(folder)


def test_without_timm_its_tower_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"one of timm's: pip install 'llm2clip\[timm\]'"):
        LLM2CLIP.from_pretrained(small.write_checkpoint(tmp_path, "siglip2"))


@pytest.fixture
def known(finished_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny teacher, of the right width, in the place of the released one."""
    for name, row in table.RELEASED.items():
        if row.teacher is not None:
            monkeypatch.setitem(table.RELEASED, name, row._replace(teacher=str(finished_teacher)))
    return finished_teacher


def test_the_teacher_is_known_and_opened_at_the_first_text(known: Path, tmp_path: Path) -> None:
    from llm2clip.pipeline import Teacher

    weights = small.openai()
    model = LLM2CLIP.from_pretrained(small.write_checkpoint(tmp_path, "openai", dict(weights)), device="cpu")
    assert model.origin["teacher"] == str(known) and model.origin["tower"] == "openai/clip-vit-base-patch16"
    model.encode_image(list(draws("openai")[0].numpy()))
    assert len(model.parts) == 1, "the teacher was opened for images"
    texts = ["a red disc", "a blue square"]
    vectors = torch.from_numpy(Teacher.from_pretrained(str(known), device="cpu").encode_text(texts))
    expected = small.expected("openai", weights, draws("openai")[0], vectors)[1]
    np.testing.assert_allclose(model.encode_text(texts), expected, atol=1e-5)
    assert len(model.parts) == 2


def test_a_teacher_of_another_width_is_refused(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "T", 24)
    folder = small.write_checkpoint(tmp_path, "openai")
    with pytest.raises(UsageError, match=r"gives 32 numbers a text, the student .* reads 24"):
        LLM2CLIP.from_pretrained(folder, known, device="cpu")
    model = LLM2CLIP.from_pretrained(folder, device="cpu")
    with pytest.raises(UsageError, match=r"gives 32 numbers a text, the student .* reads 24"):
        model.encode_text(["a"])


def test_one_whose_teacher_is_not_public_takes_one_that_is_given(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = LLM2CLIP.from_pretrained(small.write_checkpoint(tmp_path, "siglip2"), device="cpu")
    with pytest.raises(UsageError, match="opened without its teacher"):
        model.encode_text(["a"])


def test_training_goes_on_from_the_whole_student(tmp_path: Path) -> None:
    folder = small.write_checkpoint(tmp_path, "openai")
    whole = open_released(find_model(folder))[0]
    student = start_student(str(folder), teacher_dim=small.T, projection_dim=small.D)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value)
    assert open_transform(str(folder)).image_size == (32, 32)
    sigmoid = start_student(str(folder), teacher_dim=small.T, projection_dim=small.D, loss="sigmoid", image_size=48)
    assert sigmoid.logit_bias.item() == -10 and sigmoid.logit_scale.item() == pytest.approx(3.7)
    assert sigmoid.tower.embeddings.position_embedding.weight.shape == (37, 32)
    torch.testing.assert_close(sigmoid.visual_projection.weight, whole.visual_projection.weight)
    for options, words in (
        ({"teacher_dim": 24}, "reads vectors of 32 numbers, the bank's have 24; .*CC-Finetuned"),
        ({"projection_dim": 1280}, "give dim=20"),
        ({"adaptor_blocks": 2}, "give adaptor_blocks=4"),
        ({"init": "random"}, "give init='pretrained'"),
    ):
        with pytest.raises(UsageError, match=words):
            start_student(str(folder), **{"teacher_dim": small.T, "projection_dim": small.D, **options})


def test_it_is_no_teacher(tmp_path: Path) -> None:
    from llm2clip import load_teacher

    with pytest.raises(
        UsageError, match=r"is a student, which sees images; give its teacher, microsoft/LLM2CLIP-Llama-3-8B"
    ):
        load_teacher(small.write_checkpoint(tmp_path, "openai"))
