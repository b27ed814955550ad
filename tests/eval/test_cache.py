"""Vectors kept on disk: nothing is encoded twice, and nothing that has changed is taken for what it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.data.sample import ImageRef
from llm2clip.errors import ArtifactError
from llm2clip.eval import run
from llm2clip.eval.cache import Features, arithmetic_of, image_key, model_digest
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.run import evaluate
from tests.eval.test_run import Colours
from tests.loopback_hub import LoopbackHub, Repository


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What goes through the model."""
    found: list[Any] = []

    class Noting(Colours):
        num_cut = 0

        def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
            found.extend(texts)
            self.num_cut += len(texts)
            return super().encode_text(texts)

        def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
            found.extend(["image"] * len(images))
            return super().encode_image(images)

    monkeypatch.setattr(run, "open_encoder", lambda config: (Noting(), {"encoder": "colours"}))
    return found


def test_a_second_run_encodes_only_what_is_new(images_csv: Path, tmp_path: Path, seen: list[Any]) -> None:
    data = tmp_path / "data"
    shutil.copytree(images_csv.parent, data)
    options: dict[str, Any] = {"data": (str(data / "captions.csv"),), "cache": str(tmp_path / "cache")}
    first = evaluate(EvaluateConfig(model="org/one", **options, out=tmp_path / "first"))
    assert len(seen) == 24 + 48 and first["datasets"]["captions"]["captions_cut"] == 48
    seen.clear()
    again = evaluate(EvaluateConfig(model="org/one", **options, out=tmp_path / "again"))
    assert seen == [] and again["metrics"] == first["metrics"] and again["similarity"] == first["similarity"]
    assert "captions_cut" not in again["datasets"]["captions"], "nobody has counted them"
    text = (data / "captions.csv").read_text()
    (data / "captions.csv").write_text(text.replace(",a small red disc,", ",a tiny red disc,"))
    os.utime(data / "003.jpg", (1, 1))
    evaluate(EvaluateConfig(model="org/one", **options, out=tmp_path / "changed"))
    assert sorted(seen) == ["a tiny red disc", "image"]
    seen.clear()
    evaluate(EvaluateConfig(model="org/two", **options, out=tmp_path / "two"))
    assert len(seen) == 24 + 48
    seen.clear()
    evaluate(EvaluateConfig(model="org/one", precision="bf16", **options, out=tmp_path / "bf16"))
    assert len(seen) == 24 + 48


def test_bad_images_are_bad_again(images_csv: Path, tmp_path: Path, seen: list[Any]) -> None:
    data = tmp_path / "data"
    shutil.copytree(images_csv.parent, data)
    (data / "007.jpg").write_bytes((data / "007.jpg").read_bytes()[:200])
    options: dict[str, Any] = {"data": (str(data / "captions.csv"),), "cache": str(tmp_path / "cache")}
    options |= {"model": "org/one", "max_bad_fraction": 0.5}
    first, again = (evaluate(EvaluateConfig(**options, out=tmp_path / name)) for name in ("first", "again"))
    assert first["datasets"]["captions"]["images"] == again["datasets"]["captions"]["images"] == 23
    assert again["datasets"]["captions"]["bad"]["num_bad"] == 1 and again["metrics"] == first["metrics"]


def test_a_model_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "m" / "log.jsonl").write_text("a log")
    before = model_digest([(str(tmp_path / "m"), None)], "fp32")
    (tmp_path / "m" / "log.jsonl").write_text("a longer log")
    shutil.copytree(tmp_path / "m", tmp_path / "moved")
    assert model_digest([(str(tmp_path / "moved"), None)], "fp32") == before
    assert model_digest([(f"open_clip:local-dir:{tmp_path / 'm'}", None)], "fp32") == before
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weighty")
    assert model_digest([(str(tmp_path / "m"), None)], "fp32") != before


def test_what_is_damaged_is_told_and_what_is_new_is_added(tmp_path: Path) -> None:
    for number in range(2):
        kept = Features(tmp_path, "model")
        kept.put(f"key{number}", np.full(3, number, np.float32))
        kept.save()
        kept.save()
    kept = Features(tmp_path, "model")
    assert [kept.get(f"key{number}").tolist() for number in range(2)] == [[0] * 3, [1] * 3]  # type: ignore[union-attr]
    assert kept.get("key2") is None and Features(tmp_path, "other").get("key0") is None
    next((tmp_path / "model").glob("*.npy")).write_bytes(b"no array")
    with pytest.raises(ArtifactError, match=r"is damaged .*; delete .*model"):
        Features(tmp_path, "model")
    assert image_key(ImageRef(str(tmp_path / "none.jpg"))) == ""


def test_a_hub_model_is_its_commit_though_not_all_files_were_fetched(hub: LoopbackHub) -> None:
    from huggingface_hub import snapshot_download

    found = []
    for number in range(2):
        files = {"config.json": b"{}", "model.safetensors": b"weights %d" % number, "README.md": b"never fetched"}
        hub.repositories["model", "org/one"] = Repository(files)
        snapshot_download("org/one", allow_patterns=["config.json", "model.safetensors"])
        found += [model_digest([(name, None)], "fp32") for name in ("org/one", "open_clip:hf-hub:org/one")]
    assert len(set(found)) == 4


@pytest.mark.parametrize("file", ["pytorch_model.bin", "LLM2CLIP-EVA02-B-16.pt", "open_clip_model.safetensors"])
def test_weights_of_every_format_are_looked_at(file: str, tmp_path: Path) -> None:
    found = []
    for number in range(2):
        (tmp_path / file).write_bytes(b"weights %d" % number)
        for name in (str(tmp_path), f"open_clip:local-dir:{tmp_path}", f"open_clip:ViT-B-32/{tmp_path / file}"):
            found.append(model_digest([(name, None)], "fp32"))
    assert len(set(found[:3])) == 2 and not set(found[:3]) & set(found[3:])


def test_what_a_model_computes_in_is_part_of_it() -> None:
    class Opened:
        def __init__(self, dtype: torch.dtype) -> None:
            self.model = torch.nn.Linear(2, 2, dtype=dtype)

    cpu, single, half = torch.device("cpu"), Opened(torch.float32), Opened(torch.float16)
    found = [arithmetic_of(single, "auto", cpu), arithmetic_of(half, "auto", cpu)]
    assert found == ["auto cpu torch.float32", "auto cpu torch.float16"]
    assert arithmetic_of(single, "auto", torch.device("cuda:1")) == "auto cuda torch.float32"


def test_the_vectors_of_a_released_student_are_those_of_its_teacher_too(
    images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any]
) -> None:
    origin = {"teacher": str(tmp_path / "teacher"), "tower": "org/tower", "tower_revision": "v1"}
    (tmp_path / "teacher").mkdir()
    opened = run.open_encoder
    monkeypatch.setattr(run, "open_encoder", lambda config: (opened(config)[0], {"encoder": "released", **origin}))
    options: dict[str, Any] = {"data": (str(images_csv),), "cache": str(tmp_path / "cache"), "model": "org/one"}
    for number, count in ((0, 72), (0, 0), (1, 72)):
        (tmp_path / "teacher" / "model.safetensors").write_bytes(b"weights %d" % number)
        seen.clear()
        evaluate(EvaluateConfig(**options, out=tmp_path / f"report-{number}-{count}"))
        assert len(seen) == count
    model = opened(None)[0]  # type: ignore[arg-type]
    model.origin = origin
    config = EvaluateConfig(**options, out=tmp_path)
    monkeypatch.setattr(run, "Features", lambda folder, digest: digest)
    before = run.features_of(config, model, ("org/two", None))
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"others")
    assert run.features_of(config, model, ("org/two", None)) != before


def test_the_baseline_is_known_by_the_revision_it_was_opened_at(
    images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Cutting(Colours):
        num_cut = 0

        def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
            seen.extend(texts)
            self.num_cut += len(texts)
            return super().encode_text(texts)

    options: dict[str, Any] = {"data": (str(images_csv),), "cache": str(tmp_path / "cache"), "model": "org/one"}
    for number, (revision, cut) in enumerate((("v1", 48), ("v1", None), ("v2", 48))):
        facts = {"encoder": "llm2clip", "tower_revision": revision}
        monkeypatch.setattr(run, "open_encoder", lambda config, facts=facts: (Colours(), facts))
        monkeypatch.setattr(run, "open_baseline", lambda config, facts: (Cutting(), {"model": "org/tower"}))
        seen.clear()
        report = evaluate(EvaluateConfig(**options, out=tmp_path / str(number)))
        assert report["baseline"].get("captions_cut") == cut and len(seen) == (cut or 0)
