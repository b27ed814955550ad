"""What a teacher's fingerprint sees: every weight, every settings file, and nothing of the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.errors import UsageError
from llm2clip.teacher.fingerprint import compute_fingerprint, folder_fingerprint, forget_origin, quick_digests
from llm2clip.teacher.model import load_teacher, teacher_fingerprint

SETTINGS = (
    "config.json modules.json router_config.json sentence_bert_config.json config_sentence_transformers.json "
    "joined_config.json tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja vocab.txt "
    "vocab.json merges.txt tokenizer.model spiece.model"
).split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of 400 kB with every settings file, a module, and things beside it that are none of it."""
    for place in ("", "1_Pooling", "checkpoint-3", "adapter"):
        (tmp_path / place).mkdir(exist_ok=True)
        for name in SETTINGS:
            (tmp_path / place / name).write_text('{"a": [{"b": 1, "_name_or_path": "/x"}]}' if "json" in name else "x")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 1600)
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.mark.parametrize("place", ["", "1_Pooling"])
def test_every_settings_file_counts(place: str, folder: Path) -> None:
    for name in SETTINGS:
        whole, quick = compute_fingerprint(folder), quick_digests(folder)
        file = folder / place / name
        file.write_text('{"a": [{"b": 2}]}' if "json" in name else "y")
        assert compute_fingerprint(folder) != whole, name
        assert quick_digests(folder) != quick, name


def test_every_weight_counts_and_the_ends_of_a_file_are_in_the_quick_look(folder: Path) -> None:
    assert list(quick_digests(folder))[-1] == "vocab.txt" and "2_Dense/model.safetensors" in quick_digests(folder)
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        for place in (0, -1):
            whole, quick = compute_fingerprint(folder), quick_digests(folder)
            content = bytearray((folder / name).read_bytes())
            content[place] ^= 1
            (folder / name).write_bytes(content)
            assert compute_fingerprint(folder) != whole
            assert quick_digests(folder) != quick


def test_neither_the_place_nor_what_lies_beside_the_model_counts(folder: Path) -> None:
    whole, quick = compute_fingerprint(folder), quick_digests(folder)
    (folder / "config.json").write_text('{"a": [{"b": 1, "_name_or_path": "/elsewhere"}], "transformers_version": "9"}')
    assert compute_fingerprint(folder) == whole
    (folder / "config.json").write_text('{"a": [{"b": 1, "_name_or_path": "/x"}]}')
    for name in ("checkpoint-3/config.json", "adapter/adapter_model.safetensors", "log.jsonl"):
        (folder / name).write_text("other")
    assert compute_fingerprint(folder) == whole and quick_digests(folder) == quick


def test_a_manifest_is_trusted_as_long_as_the_files_are_as_it_says(folder: Path) -> None:
    manifest = {"fingerprint": "as recorded", "files": quick_digests(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert folder_fingerprint(folder) == "as recorded"
    (folder / "merges.txt").write_text("other")
    assert folder_fingerprint(folder) == compute_fingerprint(folder) != "as recorded"


def test_what_holds_no_weights_has_none(tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UsageError, match="is no folder" if place.name == "nothing" else "holds no model weights"):
            folder_fingerprint(place)


def test_a_model_in_memory_is_known_by_weights_settings_and_prompts(finished_teacher: Path) -> None:
    def changed(change) -> str:
        teacher = load_teacher(finished_teacher, device="cpu")
        forget_origin(teacher)
        change(teacher)
        return teacher_fingerprint(teacher)

    as_it_is = changed(lambda teacher: None)
    assert as_it_is == changed(lambda teacher: None)
    assert as_it_is != changed(lambda teacher: teacher[0].model.norm.weight.data.mul_(1.01))
    assert as_it_is != changed(lambda teacher: setattr(teacher[1], "pooling_mode", "cls"))
    assert as_it_is != changed(lambda teacher: teacher.prompts.update(query="find "))
