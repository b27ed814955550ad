"""What folders say of themselves: origins, changed models, weights that are missing or a pickle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip import LLM2CLIP
from llm2clip.errors import ArtifactError, UsageError
from llm2clip.hub import find_model
from llm2clip.opening import check_unchanged, origin_of


def test_the_origin_by_hand() -> None:
    facts = {
        "fingerprint": "f",
        "teacher_fingerprint": "t",
        "prompt": "",
        "num_samples": 9,
        "steps": 3,
        "kinds": ["short"],
        "files": 1,
    }
    config = {"tower": "org/tower", "batch_size": 8, "steps": 100, "seed": 0, "teacher": "teacher"}
    kept = {name: facts[name] for name in facts if name != "files"}
    assert origin_of({**facts, "config": config}) == {**kept, "tower": "org/tower", "batch_size": 8}
    assert origin_of({"teacher": "org/teacher", "config": config})["teacher"] == "org/teacher", "not of the settings"
    assert origin_of({}) == {}


def test_a_model_that_changed_since(tmp_path: Path) -> None:
    check_unchanged(Path("out"), tmp_path, "first")  # it says nothing of itself
    (tmp_path / "manifest.json").write_text(json.dumps({"fingerprint": "second"}))
    check_unchanged(Path("out"), tmp_path, "second")
    check_unchanged(Path("out"), tmp_path, None)
    with pytest.raises(UsageError, match=r"^out out was made of .* fingerprint first; it has second now"):
        check_unchanged(Path("out"), tmp_path, "first")


def test_a_student_that_lacks_weights(finished_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_student, tmp_path / "student"))
    weights = load_file(folder / "model.safetensors")
    del weights["adaptor.norm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks weights of the student, such as adaptor\.norm\.bias"):
        LLM2CLIP.from_pretrained(folder)


def test_a_student_with_weights_too_many(finished_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_student, tmp_path / "student"))
    weights = load_file(folder / "model.safetensors")
    weights |= {
        "visual_projection.bias": torch.zeros(24),
        "text_model.a": torch.zeros(1),
        "text_model.b": torch.zeros(1),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"does not have: text_model \(2 weights\), visual_projection$"):
        LLM2CLIP.from_pretrained(folder)


def test_a_student_is_named_as_it_was_given(
    finished_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a Hub id the snapshot's path in the cache says nothing."""
    folder = Path(shutil.copytree(finished_student, tmp_path / "snapshot"))
    (folder / "preprocessor_config.json").unlink()
    found = dataclasses.replace(find_model(folder), name="org/student")
    with pytest.raises(UsageError, match=r"^org/student has no usable image processor"):
        LLM2CLIP.from_pretrained(found)


def test_weights_in_a_pickle_are_not_opened(finished_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_student, tmp_path / "student"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="keeps its weights in a pickle"):
        LLM2CLIP.from_pretrained(folder)
