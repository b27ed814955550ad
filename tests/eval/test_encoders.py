"""CLIP, SigLIP and multimodal SentenceTransformer folders as baselines, read as they were trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from safetensors.torch import load_file, save_file

from llm2clip.errors import UsageError
from llm2clip.eval import models
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.encoders import SentenceTransformerEncoder
from llm2clip.eval.models import open_baseline, open_encoder
from llm2clip.eval.run import evaluate
from llm2clip.pipeline import Teacher
from llm2clip.two_towers import ClipEncoder

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**VISION, "vocab_size": 128}
SIDE = {"height": 32, "width": 32}
TEXTS = ["A Red Disc", "a small blue square on the left", "a " * 40]


@pytest.fixture(scope="module")
def folders(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny CLIP and a tiny SigLIP with tokenizer and image processor."""
    root = tmp_path_factory.mktemp("baselines")
    torch.manual_seed(0)
    clip = t.CLIPConfig(
        text_config={**TEXT, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    t.CLIPModel(clip).save_pretrained(root / "clip")
    t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIDE).save_pretrained(root / "clip")
    siglip = t.SiglipConfig(
        text_config={**TEXT, "max_position_embeddings": 12, "projection_size": 32},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
    )
    t.SiglipModel(siglip).save_pretrained(root / "siglip")
    t.SiglipImageProcessor(size=SIDE).save_pretrained(root / "siglip")
    for name in ("clip", "siglip"):
        t.AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(root / name)
    return {name: root / name for name in ("clip", "siglip")}


def unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors, dim=-1).detach().numpy()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_vectors_are_those_of_the_model(folders: dict[str, Path], name: str) -> None:
    encoder = ClipEncoder.from_pretrained(folders[name])
    images = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    model = t.AutoModel.from_pretrained(folders[name]).eval()
    pixels = t.AutoImageProcessor.from_pretrained(folders[name])(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = unit(model.get_image_features(pixels).pooler_output)
    np.testing.assert_allclose(encoder.encode_image(images, batch_size=1), expected, atol=1e-6)
    prepared = [encoder.prepare_image(image) for image in images]
    np.testing.assert_allclose(encoder.encode_image(prepared), expected, atol=1e-6)
    texts = encoder.encode_text(TEXTS, batch_size=2)
    assert texts.dtype == np.float32 and texts.shape == (3, expected.shape[1])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)


def test_siglip_reads_lower_case_padded_to_its_length_without_a_mask(folders: dict[str, Path]) -> None:
    encoder = ClipEncoder.from_pretrained(folders["siglip"])
    tokens = encoder.tokens(TEXTS)
    assert list(tokens) == ["input_ids"] and tokens["input_ids"].shape == (3, 12)
    words = encoder.tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])
    assert words == ["<s>", "a", "red", "disc", *["<pad>"] * 8]
    assert torch.equal(encoder.tokens(TEXTS[:1])["input_ids"], tokens["input_ids"][:1])  # also beside no longer one
    model = t.SiglipModel.from_pretrained(folders["siglip"]).eval()
    with torch.no_grad():
        expected = unit(model.get_text_features(input_ids=tokens["input_ids"]).pooler_output)
    np.testing.assert_allclose(encoder.encode_text(TEXTS), expected, atol=1e-6)


def test_captions_past_the_context_are_cut_and_counted(folders: dict[str, Path]) -> None:
    encoder = ClipEncoder.from_pretrained(folders["clip"])
    tokens = encoder.tokens(TEXTS)
    assert tokens["input_ids"].shape == (3, 16) and encoder.num_cut == 1
    assert tokens["attention_mask"][0].sum() == 4, "CLIP is not padded beyond the longest, and masked"


def test_captions_of_clip_are_those_of_the_model_in_every_precision(folders: dict[str, Path]) -> None:
    model = t.CLIPModel.from_pretrained(folders["clip"]).eval()
    tokenizer = t.AutoTokenizer.from_pretrained(folders["clip"])
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = unit(
            model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        )
    encoder = ClipEncoder.from_pretrained(folders["clip"])
    assert encoder.model.dtype == torch.float32
    np.testing.assert_allclose(encoder.encode_text(TEXTS), expected, atol=1e-6)
    half = ClipEncoder.from_pretrained(folders["clip"], dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert (half.encode_text(TEXTS) * expected).sum(1).min() > 0.99


def test_a_caption_that_just_fits_is_not_cut(folders: dict[str, Path]) -> None:
    encoder = ClipEncoder.from_pretrained(folders["clip"])
    encoder.tokens(["a " * 15, "a " * 16])  # and <s> before them: 16 and 17 of 16
    assert encoder.num_cut == 1
    encoder.tokenizer.model_max_length = 8
    assert ClipEncoder(encoder.model, encoder.tokenizer, encoder.processor).context == 8


def test_clip_as_a_baseline(folders: dict[str, Path], images_csv: Path, tmp_path: Path) -> None:
    report = evaluate(EvaluateConfig(model=str(folders["clip"]), data=(str(images_csv),), out=tmp_path / "report"))
    assert report["model"]["encoder"] == "CLIPModel"
    assert "captions/short/i2t_r@1" in report["metrics"]
    assert report["datasets"]["captions"]["captions_cut"] == 24  # the long ones


def test_multimodal_sentence_transformer_as_a_baseline(
    folders: dict[str, Path], images_csv: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    tokenizer = t.AutoTokenizer.from_pretrained(folders["clip"], model_max_length=16)
    processor = t.CLIPProcessor(t.AutoImageProcessor.from_pretrained(folders["clip"]), tokenizer)
    processor.save_pretrained(tmp_path / "both")
    t.CLIPModel.from_pretrained(folders["clip"]).save_pretrained(tmp_path / "both")
    SentenceTransformer(modules=[Transformer(str(tmp_path / "both"))]).save_pretrained(str(tmp_path / "st"))
    encoder = SentenceTransformerEncoder.from_pretrained(tmp_path / "st")
    images = [images_csv.parent / f"{i:03d}.jpg" for i in range(3)]
    expected = ClipEncoder.from_pretrained(folders["clip"]).encode_image(images)
    np.testing.assert_allclose(encoder.encode_image(images), expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(encoder.encode_text(TEXTS[:2]), axis=1), 1, atol=1e-5)
    half = SentenceTransformerEncoder.from_pretrained(tmp_path / "st", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    report = evaluate(EvaluateConfig(model=str(tmp_path / "st"), data=(str(images_csv),), out=tmp_path / "report"))
    assert "captions/long/t2i_r@10" in report["metrics"]
    weights = load_file(tmp_path / "st" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "st" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"st lacks weights, such as visual_projection\.weight"):
        SentenceTransformerEncoder.from_pretrained(tmp_path / "st")


def test_folders_that_cannot_serve(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(UsageError, match="cannot be loaded"):
        ClipEncoder.from_pretrained(tmp_path)


def test_weights_that_are_a_pickle_or_missing_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(folders["clip"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = EvaluateConfig(model=str(folder), data=("a.csv",), out=tmp_path / "report", device="cpu")
    with pytest.raises(UsageError, match=r"lacks weights, such as visual_projection\.weight"):
        open_encoder(config)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="keeps its weights in a pickle"):
        open_encoder(config)


@pytest.mark.parametrize("kind", ["image processor of another size", "tokenizer without padding", "naflex"])
def test_a_baseline_that_cannot_encode_is_told_when_it_is_opened(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    if kind == "image processor of another size":
        side = {"height": 40, "width": 40}
        t.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=side).save_pretrained(folder)
    elif kind == "tokenizer without padding":
        tokenizer = t.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
    else:
        shutil.rmtree(folder)
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"patch_size": 8, "num_patches": 16}
        text = {**TEXT, "max_position_embeddings": 12, "projection_size": 32}
        t.Siglip2Model(t.Siglip2Config(vision_config=vision, text_config=text)).save_pretrained(folder)
        t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
        t.AutoTokenizer.from_pretrained(folders["clip"]).save_pretrained(folder)
    with pytest.raises(UsageError, match="clip cannot be loaded and run: "):
        ClipEncoder.from_pretrained(folder)
    if kind == "naflex":  # as training says it
        with pytest.raises(UsageError, match="fixed resolution"):
            open_encoder(EvaluateConfig(model=str(folder), data=("none",), out=tmp_path / "out", device="cpu"))


@pytest.fixture(scope="module")
def student_of_clip(
    folders: dict[str, Path], finished_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """The finished student, saying in its manifest that its tower was this one."""

    def named(tower: str, **facts: object) -> str:
        folder = shutil.copytree(finished_student, tmp_path_factory.mktemp("students") / "student")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest = {**manifest, **facts, "config": {**manifest["config"], "tower": tower}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return str(folder)

    return named


def test_a_student_is_compared_with_the_clip_that_its_tower_was_of(
    student_of_clip: Callable[[str], str],
    folders: dict[str, Path],
    finished_teacher: Path,
    images_csv: Path,
    tmp_path: Path,
) -> None:
    data = (str(images_csv),)
    student = student_of_clip(str(folders["clip"]), kinds=["short", "zh"])
    (Path(student) / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    config = EvaluateConfig(model=student, teacher=str(finished_teacher), data=data, out=tmp_path / "report")
    report = evaluate(config)
    alone = evaluate(EvaluateConfig(model=str(folders["clip"]), data=data, out=tmp_path / "clip"))
    baseline = report["baseline"]
    assert baseline["model"] == str(folders["clip"]) and baseline["captions_cut"] == 24
    assert baseline["metrics"] == alone["metrics"] != report["metrics"]
    assert baseline["intervals"] == alone["intervals"] and alone["baseline"] == {}
    note = "captions here are of kind short, long; the model was trained on short, zh"
    assert report["datasets"]["captions"]["notes"] == [note]
    page = (tmp_path / "report" / "report.html").read_text()
    assert note in page and f"the baseline {folders['clip']} (which reads 24 captions only in part): clearly" in page
    assert "Training: loss." in page and page.count('<li class="right">') > 20
    assert len(page) < 1_000_000


@pytest.mark.parametrize(
    ("tower", "why"),
    [
        ("nowhere/at-all", "no baseline: the tower it was trained from, nowhere/at-all, is not on this machine"),
        ("TOWER", "no baseline: the tower it was trained from, TOWER, has no text half"),
    ],
)
def test_without_a_text_half_here_the_report_says_so(
    tower: str,
    why: str,
    student_of_clip: Callable[[str], str],
    tiny_tower: Path,
    finished_teacher: Path,
    images_csv: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    student = student_of_clip(tower.replace("TOWER", str(tiny_tower)))
    config = EvaluateConfig(
        model=student, teacher=str(finished_teacher), data=(str(images_csv),), out=tmp_path / "report"
    )
    with caplog.at_level("INFO", logger="llm2clip"):
        report = evaluate(config)
    line = why.replace("TOWER", str(tiny_tower))
    assert set(report["baseline"]) == {"why"}
    assert line in caplog.text
    assert f"- {line}" in (tmp_path / "report" / "report.md").read_text().splitlines()


def test_a_tower_that_a_student_names_runs_no_code_of_its_own(
    folders: dict[str, Path], finished_student: Path, finished_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag was given for the teacher; and of a Hub id nothing is fetched."""
    asked = []
    monkeypatch.setattr(models, "open_other", lambda folder, options: asked.append((folder, options)))
    config = EvaluateConfig(
        model=str(finished_student),
        teacher=str(finished_teacher),
        data=("a.csv",),
        out=Path("unused"),
        trust_remote_code=True,
        device="cpu",
    )
    _, facts = open_baseline(config, {"encoder": "llm2clip", "tower": str(folders["clip"])})
    ((folder, options),) = asked
    assert folder.path == folders["clip"] and facts == {"model": str(folders["clip"])}
    assert options["trust_remote_code"] is False and options["device"] == torch.device("cpu")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(options) or here)
    here = str(folders["siglip"])
    _, facts = open_baseline(config, {"encoder": "llm2clip", "tower": "org/siglip", "tower_revision": "v1"})
    assert asked[1] == {"revision": "v1", "local_files_only": True, "allow_patterns": ["config.json"]}
    assert asked[2][0].path == folders["siglip"] and facts == {"model": "org/siglip"}


def test_a_baseline_that_is_named(
    finished_student: Path, finished_teacher: Path, folders: dict[str, Path], images_csv: Path, tmp_path: Path
) -> None:
    options = {"data": (str(images_csv),), "out": tmp_path / "report", "device": "cpu"}

    def opened(model: str | None, teacher: Path | None, baseline: object) -> tuple[object, dict[str, object]]:
        config = EvaluateConfig(
            model=model, teacher=str(teacher) if teacher else None, baseline=str(baseline), **options
        )
        return open_baseline(config, {"encoder": "llm2clip", "tower": str(folders["clip"])})

    student = str(finished_student)
    assert opened(student, finished_teacher, "none") == (None, {})
    found, facts = opened(student, finished_teacher, folders["siglip"])
    assert isinstance(found, ClipEncoder) and facts == {"model": str(folders["siglip"])}
    found, facts = opened(None, finished_teacher, finished_teacher)
    assert isinstance(found, Teacher) and not found.warns
    with pytest.raises(UsageError, match="needs its teacher beside it; export it"):
        opened(student, finished_teacher, finished_student)
    with pytest.raises(UsageError, match="is no folder"):
        opened(student, finished_teacher, tmp_path / "nothing")
