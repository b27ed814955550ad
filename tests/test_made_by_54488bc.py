"""Folders that commit 54488bc wrote open today and give its vectors; made_by_54488bc/make.py made them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip import (
    LLM2CLIP,
    ArtifactError,
    Bank,
    BankConfig,
    EvaluateConfig,
    ExportConfig,
    Student,
    build_bank,
    evaluate,
    export_model,
    load_teacher,
)
from llm2clip.student.adaptor_module import AdaptorModule
from llm2clip.student.model import StudentModelConfig
from llm2clip.teacher.fingerprint import compute_fingerprint, teacher_fingerprint

TEACHERS = ("lora", "full", "joined")
TEACHER_OF = {"clip": "full", "dinov2": "joined"}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
"""On the machine that made them all vectors were equal to the last bit; another CPU or torch adds in another order."""


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `teachers`, `banks`, `students`, `exports`, `reports` of that commit."""
    folder = tmp_path_factory.mktemp("made-by-54488bc")
    with tarfile.open(Path(__file__).parent / "made_by_54488bc" / "folders.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def vectors(old: Path) -> dict[str, np.ndarray]:
    """What that commit computed."""
    with np.load(old / "vectors.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def texts(old: Path) -> list[str]:
    """The texts of those vectors."""
    return list(json.loads((old / "texts.json").read_text()))


def images(old: Path, count: int = 6) -> list[Image.Image]:
    """The images of those vectors; the first two have the towers' size, so that no library can resize them."""
    return [Image.open(old / f"pictures/{i}.png") for i in range(count)]


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_gives_its_vectors(name: str, old: Path, texts: list[str], vectors: dict[str, np.ndarray]) -> None:
    folder = old / "teachers" / name
    teacher = load_teacher(folder, device="cpu", dtype="float32")
    np.testing.assert_allclose(teacher.encode(texts), vectors[f"teacher {name} float32"], **CLOSE)
    assert compute_fingerprint(folder) == manifest(folder)["fingerprint"] == teacher_fingerprint(teacher)


def test_a_teacher_in_half_precision_is_still_that(old: Path, texts: list[str], vectors: dict[str, np.ndarray]) -> None:
    """Training in bf16, as was the default, saved the weights so; by default they now are float32 on most CPUs."""
    teacher = load_teacher(old / "teachers/lora", device="cpu", dtype="auto")
    assert {weight.dtype for weight in teacher.parameters()} == {torch.bfloat16}
    found = np.asarray(teacher.encode(texts), np.float32)
    # equal to the last bit on one machine; a CPU that has bf16 rounds at other places, each time to 8 bits
    np.testing.assert_allclose(found, vectors["teacher lora auto"], atol=1 / 32)


@pytest.mark.parametrize("tower", TEACHER_OF)
@pytest.mark.parametrize("kind", ["student", "transformers", "sentence-transformers"])
def test_a_student_gives_its_vectors(
    tower: str, kind: str, old: Path, texts: list[str], vectors: dict[str, np.ndarray]
) -> None:
    """By itself with its teacher, and as both exports of it."""
    folder = old / (f"students/{tower}" if kind == "student" else f"exports/{tower}-{kind}")
    teacher = None if kind == "sentence-transformers" else old / "teachers" / TEACHER_OF[tower]
    model = LLM2CLIP.from_pretrained(folder, teacher=teacher, device="cpu")
    np.testing.assert_allclose(model.encode_text(texts), vectors[f"student {tower} text"], **CLOSE)
    np.testing.assert_allclose(model.encode_image(images(old)), vectors[f"student {tower} image"], **CLOSE)
    if teacher is not None:
        assert model.origin["teacher_fingerprint"] == manifest(teacher)["fingerprint"]


@pytest.mark.parametrize("tower", TEACHER_OF)
def test_a_bundle_runs_by_its_own_code(tower: str, old: Path, texts: list[str], vectors: dict[str, np.ndarray]) -> None:
    from sentence_transformers import SentenceTransformer

    folder = old / f"exports/{tower}-sentence-transformers"
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    adaptor = model[0].sub_modules["text"][-2]
    assert type(adaptor).__name__ == "AdaptorModule" and not isinstance(adaptor, AdaptorModule)
    np.testing.assert_allclose(model.encode(texts), vectors[f"student {tower} text"], **CLOSE)
    np.testing.assert_allclose(model.encode(images(old, 2)), vectors[f"student {tower} image"][:2], **CLOSE)


@pytest.mark.parametrize("tower", TEACHER_OF)
def test_a_transformers_export_opens_with_automodel(tower: str, old: Path, vectors: dict[str, np.ndarray]) -> None:
    """As today's class, which AutoModel takes once llm2clip is imported, and by the code in the folder."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = old / f"exports/{tower}-transformers"
    place = json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"]
    own = get_class_from_dynamic_module(place, str(folder))
    # which has put its own class in the place of ours, as ours had been by the import
    AutoConfig.register("llm2clip", StudentModelConfig, exist_ok=True)
    AutoModel.register(StudentModelConfig, Student, exist_ok=True)
    today = AutoModel.from_pretrained(folder)
    assert isinstance(today, Student) and not issubclass(own, Student)
    inputs = AutoImageProcessor.from_pretrained(folder)(images=images(old, 2), return_tensors="pt")
    embeds = torch.from_numpy(vectors[f"teacher {TEACHER_OF[tower]} float32"])
    for model in (today.eval(), own.from_pretrained(folder).eval()):
        with torch.inference_mode():
            text = model.get_text_features(embeds)
            image = torch.nn.functional.normalize(model.get_image_features(inputs["pixel_values"]), dim=-1)
        np.testing.assert_allclose(text.numpy(), vectors[f"student {tower} adaptor"], **CLOSE)
        np.testing.assert_allclose(image.numpy(), vectors[f"student {tower} image"][:2], **CLOSE)


@pytest.mark.parametrize(("tower", "class_name"), [("clip", "CLIPVisionModel"), ("dinov2", "Dinov2Model")])
def test_a_tower_is_one_of_its_family(tower: str, class_name: str, old: Path, vectors: dict[str, np.ndarray]) -> None:
    import transformers

    folder = old / f"exports/{tower}-tower"
    model, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = transformers.AutoImageProcessor.from_pretrained(folder)(images=images(old, 2), return_tensors="pt")
    with torch.inference_mode():
        pooled = model(inputs["pixel_values"]).pooler_output
    np.testing.assert_allclose(pooled.numpy(), vectors[f"tower {tower}"], **CLOSE)


@pytest.mark.parametrize(("name", "dtype"), [("full", "float16"), ("joined", "int8")])
def test_a_bank_is_built_again_with_its_vectors(
    name: str, dtype: str, old: Path, vectors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Its format was never released, so no reader is kept for it."""
    folder, data = old / "banks" / name, old / "pictures/captions.csv"
    with pytest.raises(
        ArtifactError, match=r"this bank was made by an older version \(format 1, now 2\): build it again"
    ):
        Bank.open(folder)
    before = manifest(folder)
    settings = {key: before["teacher"][key] for key in ("prompt", "precision")}
    teacher, out = str(old / "teachers" / name), tmp_path / "bank"
    config = BankConfig(data=(str(data),), teacher=teacher, out=out, dtype=dtype, device="cpu", **settings)
    bank = Bank.open(build_bank(config))
    assert (bank.num_samples, bank.num_rows, bank.dtype, list(bank.kinds)) == (8, 16, dtype, ["short", "long"])
    assert (bank.teacher_fingerprint, bank.manifest["num_tokens"]) == (
        before["teacher_fingerprint"],
        before["num_tokens"],
    )
    captions = [line.split(",")[1:] for line in data.read_text().splitlines()[1:]]
    assert [bank.texts(bank.rows(i)) for i in range(8)] == captions
    # equal to the last bit on one machine; on another CPU or torch a number may be rounded to its neighbour
    found, expected = np.asarray(bank.vectors(np.arange(16)), np.float32), vectors[f"bank {name}"]
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / (100 if dtype == "int8" else 1000))


@pytest.mark.parametrize("tower", TEACHER_OF)
def test_evaluate_gives_the_same_scores(tower: str, old: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        model=str(old / "students" / tower),
        teacher=str(old / "teachers" / TEACHER_OF[tower]),
        data=(str(old / "pictures/captions.csv"),),
        out=tmp_path / "report",
        device="cpu",
    )
    found = evaluate(config)["metrics"]
    before = json.loads((old / "reports" / tower / "report.json").read_text())["metrics"]
    assert found == before and len(set(before.values())) > 4


def test_a_tower_is_exported_today(old: Path, tmp_path: Path) -> None:
    config = ExportConfig(model=str(old / "students/clip"), to="tower", out=tmp_path / "tower", device="cpu")
    out, before = export_model(config), old / "exports/clip-tower"
    assert (out / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()


@pytest.mark.ci
@pytest.mark.parametrize(
    "tower", [pytest.param(name, marks=[pytest.mark.slow] if name != "clip" else []) for name in TEACHER_OF]
)
@pytest.mark.parametrize("kind", ["transformers", "sentence-transformers"])
def test_a_student_is_exported_today(
    tower: str, kind: str, old: Path, texts: list[str], vectors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    teacher = str(old / "teachers" / TEACHER_OF[tower])
    student = str(old / "students" / tower)
    export_model(ExportConfig(model=student, teacher=teacher, to=kind, out=tmp_path / "out", device="cpu"))
    again = LLM2CLIP.from_pretrained(tmp_path / "out", teacher if kind == "transformers" else None, device="cpu")
    np.testing.assert_allclose(again.encode_text(texts), vectors[f"student {tower} text"], **CLOSE)
    np.testing.assert_allclose(again.encode_image(images(old)), vectors[f"student {tower} image"], **CLOSE)
