"""Vectors kept on disk: nothing is encoded twice, and nothing that has changed is taken for what it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip.data.sample import ImageRef
from llm2clip.errors import ArtifactError
from llm2clip.eval import run
from llm2clip.eval.cache import Features, image_key, model_digest
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.run import evaluate
from tests.eval.test_run import Colours


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
