"""A peft folder as a teacher: the adapter is merged onto its base, and whatever does not fit is told in a line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from llm2clip.errors import UsageError
from llm2clip.hub import find_model
from llm2clip.teacher.fingerprint import teacher_fingerprint
from llm2clip.teacher.model import llm_as_encoder, load_teacher

TEXTS = ["a red disc", "a large blue square on a dark background ."]


def adapter_of(llm: Path, folder: Path, kind: type, *, seed: int = 0) -> Path:
    """An adapter of random weights on an LLM opened as `kind`, as peft saves it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(kind.from_pretrained(llm), settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForCausalLM])
def test_an_adapter_is_merged_onto_its_base(kind: type, tiny_llm: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = adapter_of(tiny_llm, tmp_path / "adapter", kind)
    assert find_model(folder).kind == "adapter"
    teacher = load_teacher(folder, device="cpu")
    plain = llm_as_encoder(tiny_llm)
    whole = PeftModel.from_pretrained(kind.from_pretrained(tiny_llm), str(folder)).merge_and_unload()
    plain[0].model.load_state_dict(getattr(whole, "model", whole).state_dict())
    np.testing.assert_allclose(teacher.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)
    assert np.abs(teacher.encode(TEXTS) - llm_as_encoder(tiny_llm).encode(TEXTS)).max() > 0.05
    assert not hasattr(teacher[0].model, "peft_config") or not teacher[0].model.peft_config
    other = load_teacher(adapter_of(tiny_llm, tmp_path / "other", kind, seed=1), device="cpu")
    prints = {teacher_fingerprint(each) for each in (teacher, other, llm_as_encoder(tiny_llm))}
    assert len(prints) == 3


def test_an_adapter_that_does_not_fit_is_told_in_a_line(tiny_llm: Path, tmp_path: Path) -> None:
    folder = adapter_of(tiny_llm, tmp_path / "adapter", AutoModel)
    weights = load_file(folder / "adapter_model.safetensors")
    name, value = next(iter(weights.items()))
    damaged = {
        "lacks": {key: w for key, w in weights.items() if key != name},
        "no place": {**weights, "base_model.model.layers.7.mlp.up_proj.lora_A.weight": value.clone()},
        "cannot be merged": {**weights, name: torch.zeros(3, 3)},
    }
    for words, changed in damaged.items():
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(UsageError, match=words) as error:
            load_teacher(folder, device="cpu")
        assert "\n" not in str(error.value)
    settings = json.loads((folder / "adapter_config.json").read_text())
    for changed, words in (
        ({"peft_type": "LOHA"}, "is an adapter of kind LOHA; give one of kind LORA"),
        ({"modules_to_save": ["norm"]}, r"replaces whole modules \(norm\); merge it yourself"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        with pytest.raises(UsageError, match=words) as error:
            load_teacher(folder, device="cpu")
        assert "\n" not in str(error.value)
    for base, words in ((None, "does not say of which model"), (str(tmp_path / "gone"), "gone is no folder")):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        with pytest.raises(UsageError, match=words):
            load_teacher(folder, device="cpu")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match="adapter without weights"):
        load_teacher(folder, device="cpu")


def test_what_peft_says_while_it_merges_is_a_line(
    tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    def merge(self: object, **_: object) -> None:
        raise ValueError("not finite\nat all")

    folder = adapter_of(tiny_llm, tmp_path / "adapter", AutoModel)
    monkeypatch.setattr(Linear, "merge", merge)
    with pytest.raises(UsageError, match=r"adapter cannot be merged into .*not finite") as error:
        load_teacher(folder, device="cpu")
    assert "\n" not in str(error.value)
