"""Released students through every verb: converted, exported, scored and trained further they stay what they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel

from llm2clip import LLM2CLIP, BankConfig, EvaluateConfig, ExportConfig, StudentConfig
from llm2clip import released as table
from llm2clip.bank.build import build_bank
from llm2clip.bundle import save_bundle
from llm2clip.errors import UsageError
from llm2clip.eval.run import evaluate
from llm2clip.export.check import PROBE_TEXTS, least_cosine, probe_images
from llm2clip.export.config import ConvertConfig
from llm2clip.export.convert import convert
from llm2clip.export.formats import tower
from llm2clip.export.run import export_model
from llm2clip.student.train import train_student
from tests.student import released as small


@pytest.fixture
def known(finished_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny teacher, of the right width, in the place of the released ones."""
    for name, row in table.RELEASED.items():
        monkeypatch.setitem(table.RELEASED, name, row._replace(teacher=str(finished_teacher)))
    return finished_teacher


@pytest.mark.parametrize("layout", ["openai", "eva02", "siglip2"])
def test_converted_and_exported_it_gives_the_same(layout: str, known: Path, tmp_path: Path) -> None:
    if layout != "openai":
        pytest.importorskip("timm")
    folder = small.write_checkpoint(tmp_path, layout)
    model = LLM2CLIP.from_pretrained(folder, device="cpu")
    image, text = model.encode_image(probe_images()), model.encode_text(PROBE_TEXTS)

    out = convert(ConvertConfig(model=str(folder), out=tmp_path / "ours"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["source"], manifest["teacher"]) == (folder.name, str(known))
    again = LLM2CLIP.from_pretrained(out, device="cpu")
    np.testing.assert_allclose(again.encode_image(probe_images()), image, atol=1e-5)
    np.testing.assert_allclose(again.encode_text(PROBE_TEXTS), text, atol=1e-5)
    assert convert(ConvertConfig(model=str(folder), out=out)) == out  # at once, it is there

    (tmp_path / "alone").mkdir()
    tower.write(model, tmp_path / "alone")
    found = tower.reload(tmp_path / "alone", {"pooling": model.student.config.pooling}, torch.device("cpu"), True)
    assert least_cosine(tower.expect(model)["image"], found["image"]) > 0.9999

    (tmp_path / "bundle").mkdir()
    save_bundle(tmp_path / "bundle", model.student, model.transform, model.teacher)
    from sentence_transformers import SentenceTransformer

    bundle = SentenceTransformer(str(tmp_path / "bundle"), trust_remote_code=True, device="cpu")
    for opened in (bundle.encode, LLM2CLIP.from_pretrained(tmp_path / "bundle", device="cpu").encode_image):
        assert least_cosine(image, np.asarray(opened(probe_images()))) > 0.9999
    for encode in (bundle.encode, bundle.encode_query):
        assert least_cosine(text, np.asarray(encode(list(PROBE_TEXTS)))) > 0.9999

    plain = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    images, vectors = (
        torch.randint(0, 256, (3, 3, *model.transform.image_size), dtype=torch.uint8),
        torch.randn(4, small.T),
    )
    with torch.inference_mode():
        for name, values in (("get_image_features", images), ("get_text_features", vectors)):
            expected, got = (normalize(getattr(each, name)(values), dim=-1) for each in (model.student, plain))
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_what_is_none_is_not_converted(finished_student: Path, tiny_tower: Path, tmp_path: Path) -> None:
    for other in (finished_student, tiny_tower):
        with pytest.raises(UsageError, match="is no student that the paper's authors released"):
            convert(ConvertConfig(model=str(other), out=tmp_path / "out"))


def test_the_verbs_take_it_as_our_own(known: Path, images_csv: Path, tmp_path: Path) -> None:
    folder, data = str(small.write_checkpoint(tmp_path, "openai")), (str(images_csv),)
    report = evaluate(EvaluateConfig(model=folder, data=data, out=tmp_path / "report", device="cpu", baseline="none"))
    assert report["model"]["source"] == Path(folder).name
    ours = evaluate(
        EvaluateConfig(
            model=str(convert(ConvertConfig(model=folder, out=tmp_path / "ours"))),
            data=data,
            out=tmp_path / "again",
            device="cpu",
            baseline="none",
        )
    )
    assert report["metrics"] == ours["metrics"]
    ExportConfig(model=folder, to="sentence-transformers", out=tmp_path / "bundle")  # its teacher is known
    out = export_model(ExportConfig(model=folder, to="tower", out=tmp_path / "tower", device="cpu"))
    assert "openai/clip-vit-base-patch16" in (out / "README.md").read_text()

    bank = build_bank(BankConfig(data=data, teacher=str(known), out=tmp_path / "bank", precision="fp32", device="cpu"))
    options = {
        "bank": (str(bank),),
        "tower": folder,
        "dim": small.D,
        "precision": "fp32",
        "workers": 0,
        "tracker": "none",
    }
    options |= {"steps": 1, "batch_size": 8, "learning_rate": 1e-9, "adaptor_learning_rate": 1e-9}
    student = train_student(StudentConfig(**options, out=tmp_path / "student"))
    before = LLM2CLIP.from_pretrained(folder, device="cpu")
    after = LLM2CLIP.from_pretrained(student, known, device="cpu")
    np.testing.assert_allclose(after.encode_image(probe_images()), before.encode_image(probe_images()), atol=1e-4)
    np.testing.assert_allclose(after.encode_text(PROBE_TEXTS), before.encode_text(PROBE_TEXTS), atol=1e-4)
