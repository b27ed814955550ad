"""Every verb through a Hub: what is downloaded, what is refused before that, and the same offline from the cache."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load

from llm2clip import LLM2CLIP, BankConfig, EvaluateConfig, StudentConfig, load_teacher
from llm2clip import released as table
from llm2clip.bank.build import build_bank
from llm2clip.data.config import SourceConfig
from llm2clip.data.images import load_image
from llm2clip.data.source import open_source
from llm2clip.errors import UsageError
from llm2clip.eval.run import evaluate
from llm2clip.hub import find_model
from llm2clip.student.start import open_tower, open_transform, start_student
from llm2clip.student.train import train_student
from tests.loopback_hub import LoopbackHub
from tests.student import released as small

OTHER_FORMATS = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.onnx", "rust_model.ot", "x.gguf")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def offline(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    """From here on only the caches are there."""
    hub.repositories.clear()
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_one_format_is_downloaded(hub: LoopbackHub, finished_teacher: Path, tiny_llm: Path) -> None:
    more = {**dict.fromkeys(OTHER_FORMATS, b"x"), "original/consolidated.00.pth": b"x", "onnx/model.onnx_data": b"x"}
    hub.add("org/llm", {**files_of(tiny_llm), **more, "consolidated.safetensors": b"x", "model.fp16.safetensors": b"x"})
    folder = find_model("org/llm")
    assert {path.name for path in folder.path.iterdir()} == set(files_of(tiny_llm))
    assert hub.sent("org/llm") == set(files_of(tiny_llm))
    hub.add("org/teacher", {**files_of(finished_teacher), **more})
    find_model("org/teacher")
    assert hub.sent("org/teacher") == set(files_of(finished_teacher))


def test_what_is_refused_is_not_downloaded(hub: LoopbackHub, tiny_llm: Path) -> None:
    files = files_of(tiny_llm)
    weights = files.pop("model.safetensors")
    hub.add("org/pickled", {**files, "pytorch_model.bin": weights})
    with pytest.raises(UsageError, match=r"^org/pickled keeps its weights in a pickle \(pytorch_model\.bin\)"):
        load_teacher("org/pickled")
    assert "pytorch_model.bin" not in hub.sent("org/pickled")


def test_a_gated_one_and_a_name_that_is_not_there(hub: LoopbackHub, tiny_llm: Path) -> None:
    hub.add("org/gated", tiny_llm, gated=True)
    for name, words in (
        ("org/gated", "org/gated cannot be fetched"),
        ("org/none", "the Hub has no model of that name"),
    ):
        with pytest.raises(UsageError, match=words) as error:
            find_model(name)
        assert "\n" not in str(error.value) and "snapshots" not in str(error.value)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_tower_with_safetensors_or_a_bin_alone(
    pickled: bool, hub: LoopbackHub, tiny_tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    files = files_of(tiny_tower)
    if pickled:
        torch.save(load_file(tiny_tower / "model.safetensors"), target := tiny_tower.parent / "weights.bin")
        del files["model.safetensors"]
        files["pytorch_model.bin"] = target.read_bytes()
    hub.add("org/tower", {**files, "tf_model.h5": b"x"})
    local = start_student(str(tiny_tower), teacher_dim=8, projection_dim=4).tower.state_dict()
    for _ in ("online", "offline"):
        student = start_student("org/tower", teacher_dim=8, projection_dim=4)
        assert all(torch.equal(value, local[name]) for name, value in student.tower.state_dict().items())
        assert open_transform("org/tower").image_size == (32, 32)
        assert "tf_model.h5" not in hub.files
        offline(monkeypatch, hub)


def test_a_tower_whose_bin_would_run_code(hub: LoopbackHub, tiny_tower: Path, tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "ran"), "w")

    files = {name: data for name, data in files_of(tiny_tower).items() if name != "model.safetensors"}
    hub.add("org/evil", {**files, "pytorch_model.bin": pickle.dumps({"x": Evil()})})
    with pytest.raises(
        UsageError, match=r"org/evil cannot be used: its pytorch_model.bin holds more than tensors"
    ) as error:
        start_student("org/evil", teacher_dim=8, projection_dim=4)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_released_students_by_name(
    hub: LoopbackHub, finished_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three lines of README.md, online and then from the cache."""
    hub.add(table.LLAMA_8B, finished_teacher)
    names = {"openai": "microsoft/LLM2CLIP-Openai-L-14-336", "eva02": "microsoft/LLM2CLIP-EVA02-L-14-336"}
    if importlib.util.find_spec("timm") is None:
        del names["eva02"]
    for layout, name in names.items():
        files = files_of(small.write_checkpoint(tmp_path / layout, layout))
        more = {"modeling_clip.py": b"raise SystemExit", "README.md": b"", "pytorch_model.bin": b"no weights"}
        hub.add(name, {**files, **more})
    images = [np.zeros((40, 50, 3), np.uint8)]
    first: dict[str, Any] = {}
    for _ in ("online", "offline"):
        for layout, name in names.items():
            model = LLM2CLIP.from_pretrained(name, device="cpu")
            image = model.encode_image(images)
            assert not first.keys() & {name} or not hub.files
            if name not in first:
                assert not hub.sent(table.LLAMA_8B) or layout != "openai", "the teacher was fetched for images"
                assert "pytorch_model.bin" not in hub.sent(name)
            pair = np.concatenate([image, model.encode_text(["a red disc"])])
            np.testing.assert_array_equal(pair, first.setdefault(name, pair))
            assert model.origin["source"].startswith(f"{name}@") and len(model.origin["source"].split("@")[1]) == 40
        offline(monkeypatch, hub)


def test_a_folder_of_images_on_the_hub(hub: LoopbackHub, images_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name: path.read_bytes() for path in sorted(images_csv.parent.glob("*.jpg"))[:3]}
    rows = "".join(f'{{"file_name": "{name}", "text": "caption {name}"}}\n' for name in files)
    hub.add("org/images", {**files, "metadata.jsonl": rows.encode()}, kind="dataset")
    for _ in ("online", "offline"):
        samples = list(open_source(SourceConfig(data=("hf:org/images",))))
        assert [sample.captions["raw"] for sample in samples] == [(f"caption {name}",) for name in files]
        assert load_image(samples[0].image).size == (48, 40)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_every_verb_takes_names(
    hub: LoopbackHub, finished_teacher: Path, tiny_tower: Path, images_csv: Path, tmp_path: Path
) -> None:
    hub.add("org/teacher", finished_teacher)
    hub.add("org/tower", tiny_tower)
    data = (str(images_csv),)
    bank = build_bank(
        BankConfig(data=data, teacher="org/teacher", out=tmp_path / "bank", precision="fp32", device="cpu")
    )
    options: dict[str, Any] = {"precision": "fp32", "workers": 0, "tracker": "none", "steps": 1, "batch_size": 8}
    student = train_student(StudentConfig(bank=(str(bank),), tower="org/tower", out=tmp_path / "student", **options))
    hub.add("org/student", student)
    report = evaluate(
        EvaluateConfig(model="org/student", teacher="org/teacher", data=data, out=tmp_path / "report", device="cpu")
    )
    assert report["model"]["tower"] == "org/tower"
    files = {name: data for name, data in files_of(student).items() if name != "preprocessor_config.json"}
    hub.add("org/cut", files)
    with pytest.raises(UsageError, match=r"^org/cut has no usable image processor"):
        LLM2CLIP.from_pretrained("org/cut")


def test_a_pickle_in_one_module_is_refused_before_the_rest_is_downloaded(hub: LoopbackHub, tiny_llm: Path) -> None:
    files = {**files_of(tiny_llm), "modules.json": b"[]", "2_Dense/pytorch_model.bin": b"x"}
    hub.add("org/mixed", files)
    hub.forget()
    with pytest.raises(UsageError, match=r"keeps its weights in a pickle \(2_Dense/pytorch_model\.bin\)"):
        find_model("org/mixed")
    assert "model.safetensors" not in hub.sent("org/mixed")


def test_a_tower_beside_safetensors_of_another_library(hub: LoopbackHub, tiny_tower: Path) -> None:
    files = dict(files_of(tiny_tower))
    weights = load(files.pop("model.safetensors"))
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    hub.add("org/both", {**files, "pytorch_model.bin": buffer.getvalue(), "open_clip_model.safetensors": b"x"})
    student = start_student("org/both", teacher_dim=8, projection_dim=8, adaptor_blocks=1)
    assert torch.equal(student.tower.post_layernorm.weight.detach(), weights["post_layernorm.weight"])


def test_a_student_of_ours_by_a_released_name(hub: LoopbackHub, finished_student: Path) -> None:
    """What lies there says what it is; as a tower it goes on as it is."""
    hub.add("me/LLM2CLIP-Openai-B-16", finished_student)
    tower = open_tower("me/LLM2CLIP-Openai-B-16")
    here = open_tower(str(finished_student))
    assert tower.whole is not None and here.whole is not None and tower.teacher == here.teacher is not None
    for name, value in here.whole[0].state_dict().items():
        assert torch.equal(tower.whole[0].state_dict()[name], value)
