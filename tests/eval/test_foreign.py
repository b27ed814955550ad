"""Models of open_clip, vectors in files, and models side by side, all under one protocol."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.errors import UsageError
from llm2clip.eval import run
from llm2clip.eval.cache import model_digest
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.foreign import OpenClipEncoder, StoredVectors, open_foreign
from llm2clip.eval.models import open_encoder
from llm2clip.eval.run import evaluate
from tests.eval.lookalikes import CLEAR, captions_of, image, text_vector, write, write_zip

CPU = torch.device("cpu")
URBAN = captions_of(1000, 1000)


@pytest.fixture(scope="module")
def urban(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's zip, and vectors of two models: the second is a clearly better one."""
    root = tmp_path_factory.mktemp("urban1k")
    files: dict[str, str | bytes] = {}
    for i, (text,) in enumerate(URBAN):
        files |= {f"Urban1k/image/{i + 1}.jpg": image(i), f"Urban1k/caption/{i + 1}.txt": text}
    write_zip(root / "Urban1k.zip", files)
    for name, mixed in (("plain", 0.0), ("better", 1.5)):
        order = np.random.default_rng(0).permutation(1000)  # the files' rows stand in an order of their own
        texts = np.stack([text_vector(text) for (text,) in URBAN]) + mixed * CLEAR[:1000]
        write_vectors(root / name, [f"image/{i + 1}.jpg" for i in order], CLEAR[order], [t for (t,) in URBAN], texts)
    return root


def write_vectors(
    folder: Path, names: Sequence[str], images: np.ndarray, texts: Sequence[str], vectors: np.ndarray
) -> None:
    lines = "".join(f"{json.dumps(text)}\n" for text in texts)
    write(folder, {"images.txt": "\n".join(name.rpartition("/")[2] for name in names), "texts.jsonl": lines})
    np.save(folder / "images.npy", images)
    np.save(folder / "texts.npy", vectors)


def test_vectors_in_files_are_scored_and_compared(urban: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        model=f"vectors:{urban / 'plain'}",
        compare=(f"vectors:{urban / 'better'}", f"vectors:{urban / 'plain'}"),
        benchmark=("urban1k",),
        root=str(urban),
        out=tmp_path / "report",
    )
    report = evaluate(config)
    plain, texts = CLEAR[:1000], np.stack([text_vector(text) for (text,) in URBAN])
    wanted = {}
    for name, vectors in (("plain", texts), ("better", texts + 1.5 * plain)):
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (plain, vectors))
        scores = a @ b.T
        wanted[name] = float(((scores >= np.diag(scores)[:, None] - 1e-6).sum(1) == 1).mean())
    assert report["metrics"]["urban1k/i2t_r@1"] == pytest.approx(wanted["plain"])
    better, same = report["compare"].values()
    assert better["metrics"]["urban1k/i2t_r@1"] == pytest.approx(wanted["better"])
    change = better["differences"]["urban1k/i2t_r@1"]
    assert change["difference"] == pytest.approx(wanted["better"] - wanted["plain"], abs=1e-6)
    assert 0 < change["low"] < change["difference"] < change["high"] and change["p"] == 0.001
    assert same["differences"]["urban1k/i2t_r@1"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    page = (tmp_path / "report" / "report.md").read_text()
    gain = 100 * (wanted["better"] - wanted["plain"])
    row = f"| urban1k/i2t_r@1 | {100 * wanted['plain']:.1f} | {100 * wanted['better']:.1f} (+{gain:.1f}; p 0.001) |"
    assert row in page and "| urban1k/i2t_map@10 | " not in page


def test_vectors_that_do_not_fit_are_told(urban: Path, tmp_path: Path) -> None:
    stored = StoredVectors(urban / "plain")
    assert np.array_equal(stored.of_images(["Urban1k/image/7.jpg", "7.jpg"]), CLEAR[[6, 6]])
    with pytest.raises(UsageError, match=r"texts.jsonl lacks 2 of 3 that are scored, such as 'new'"):
        stored.encode_text([URBAN[0][0], "new", "newer"])
    with pytest.raises(UsageError, match=r"nowhere: .*No such file"):
        open_foreign("vectors:nowhere", device=CPU)
    write_vectors(tmp_path, ["1.jpg"], CLEAR[:2], ["a"], CLEAR[:1])
    with pytest.raises(UsageError, match=r"images.npy has shape \[2, 12\], images.txt 1 lines"):
        StoredVectors(tmp_path)
    np.save(tmp_path / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="Python objects in dtype"):
        StoredVectors(tmp_path)


def test_without_open_clip_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UsageError, match=r"takes pip install 'llm2clip\[metrics\]'"):
        open_foreign("open_clip:ViT-B-32/openai", device=CPU)


@pytest.mark.ci
def test_a_model_of_open_clip_gives_its_own_vectors(
    tmp_path: Path, images_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip", reason="pip install 'llm2clip[metrics]'")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    write(tmp_path / "tiny", {"open_clip_config.json": json.dumps(config)})
    save_file(open_clip.CLIP(16, vision, text).state_dict(), tmp_path / "tiny" / "open_clip_model.safetensors")
    encoder = open_foreign(f"open_clip:local-dir:{tmp_path / 'tiny'}", device=CPU)
    assert isinstance(encoder, OpenClipEncoder)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'tiny'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'tiny'}")
    files, texts = sorted(images_csv.parent.glob("*.jpg"))[:5], ["a red disc", "a view " * 20, "two"]
    with torch.no_grad():
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        wanted = model.eval().encode_image(images, normalize=True), model.encode_text(tokenizer(texts), normalize=True)
    assert encoder.encode_image(files, batch_size=2) == pytest.approx(wanted[0].numpy(), abs=1e-5)
    assert encoder.encode_text(texts, batch_size=2) == pytest.approx(wanted[1].numpy(), abs=1e-5)
    assert encoder.num_cut == 1 and encoder.context == 16
    config = EvaluateConfig(
        model=f"open_clip:local-dir:{tmp_path / 'tiny'}", data=(str(images_csv),), out=tmp_path / "report"
    )
    facts = evaluate(config)["model"]
    assert facts == {"encoder": "CLIP", "fingerprint": model_digest([(config.model, None)], "")}
    for name, told in (
        ("ViT-B-32", "names no weights: write ViT-B-32/laion2b_s34b_b79k"),
        ("ViT-B-32/nothing", "cannot be loaded"),
        (f"local-dir:{tmp_path / 'no'}", "cannot be loaded"),
    ):
        with pytest.raises(UsageError, match=told):
            open_foreign(f"open_clip:{name}", device=CPU)


def test_images_are_needed_unless_all_models_are_vectors(tmp_path: Path) -> None:
    config = EvaluateConfig(model="vectors:a", benchmark=("urban1k",), root="r", out=tmp_path)
    assert not config.needs_images
    for change in ({"compare": ("b",)}, {"baseline": "b"}, {"model": "b"}):
        assert dataclasses.replace(config, **change).needs_images
    assert not dataclasses.replace(config, baseline="none", compare=("vectors:b",)).needs_images


def test_what_is_compared_is_opened_one_at_a_time(images_csv: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from tests.eval.test_run import Colours

    monkeypatch.setattr(run, "open_encoder", lambda config: (Colours(), {"encoder": "colours"}))
    asked = []
    monkeypatch.setattr(run, "open_beside", lambda field, name, config: asked.append((field, name)) or Colours())
    config = EvaluateConfig(model="a", compare=("b", "c"), data=(str(images_csv),), out=tmp_path / "report")
    report = evaluate(config)
    assert asked == [("compare", "b"), ("compare", "c")]
    assert report["compare"]["b"]["metrics"] == report["metrics"]


def test_a_report_of_other_vectors_is_not_taken_for_done(urban: Path, tmp_path: Path) -> None:
    shutil.copytree(urban / "plain", tmp_path / "vectors")
    config = EvaluateConfig(
        model=f"vectors:{tmp_path / 'vectors'}", benchmark=("urban1k",), root=str(urban), out=tmp_path / "report"
    )
    found = evaluate(config)
    assert evaluate(config)["metrics"] == found["metrics"]
    shutil.copy(urban / "better" / "texts.npy", tmp_path / "vectors")
    with pytest.raises(UsageError, match=r"report was made of vectors:.* when it had fingerprint \w+; it has \w+ now"):
        evaluate(config)


@pytest.mark.parametrize("model", ["vectors:a", "open_clip:ViT-B-32/openai"])
def test_what_has_no_teacher_and_no_revision_is_given_none(model: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": model, "data": ("a.csv",), "out": tmp_path}
    for field, value in (("teacher", "T"), ("model_revision", "v1")):
        with pytest.raises(UsageError, match=f"^model {model} .*; leave {field} {value} out$"):
            open_encoder(EvaluateConfig(**options, **{field: value}))
