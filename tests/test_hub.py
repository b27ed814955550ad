"""The device, and the arithmetic it is good at: one rule, and every verb follows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llm2clip import LLM2CLIP, hub
from llm2clip.artifacts import read_manifest, write_json
from llm2clip.errors import ArtifactError, UsageError
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.run import evaluate
from llm2clip.student.config import StudentConfig
from llm2clip.student.train import train_student
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.model import load_teacher, teacher_fingerprint
from llm2clip.teacher.train import train_teacher

CPU = torch.device("cpu")


@pytest.fixture
def manifests_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The manifests opened from here on, by the name of their folder."""
    read: list[str] = []
    plain = Path.read_text

    def read_text(path: Path, *args: Any, **options: Any) -> str:
        read.extend([path.parent.name] if path.name == "manifest.json" else [])
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    return read


@pytest.fixture
def names_found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names looked up from here on."""
    found: list[str] = []
    plain = hub.model_folder

    def look_up(name: str, *, revision: str | None) -> Path:
        found.append(Path(name).name)
        return plain(name, revision=revision)

    monkeypatch.setattr(hub, "model_folder", look_up)
    return found


def test_evaluate_finds_each_name_and_reads_each_manifest_once(
    finished_student: Path,
    finished_teacher: Path,
    images_csv: Path,
    tmp_path: Path,
    manifests_read: list[str],
    names_found: list[str],
) -> None:
    shutil.copytree(finished_student, tmp_path / "student")
    teacher = Path(shutil.copytree(finished_teacher, tmp_path / "teacher"))
    manifest = {"config": {"attention": "two-way"}, "fingerprint": teacher_fingerprint(teacher)}
    write_json(teacher / "manifest.json", {"format": "llm2clip/teacher", **manifest})
    names, data = (str(tmp_path / "student"), str(teacher)), (str(images_csv),)
    del manifests_read[:]
    evaluate(EvaluateConfig(model=names[0], teacher=names[1], data=data, out=tmp_path / "report", device="cpu"))
    assert names_found == ["student", "teacher"]
    assert sorted(manifests_read) == ["student", "teacher"]


def test_a_folder_is_described_as_what_it_holds(
    finished_student: Path, finished_teacher: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    student = hub.find_model(str(finished_student))
    assert (student.path, student.name, student.kind) == (finished_student, str(finished_student), "student")
    assert student.made == "student" and str(student) == student.name and hub.find_model(student) is student
    assert student.config["model_type"] == "llm2clip" and student.manifest["config"]["tower"] == "a/tower"
    assert hub.find_model(finished_teacher).kind == "sentence-transformers"
    llm = hub.find_model(tiny_llm)
    assert (llm.kind, llm.made, llm.config["model_type"], llm.manifest) == ("transformers", "", "llama", {})
    for file in ("modules.json", "student_config.json"):
        (tmp_path / file).write_text("{}")
    assert hub.find_model(tmp_path).kind == "bundle"


def test_a_model_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert hub.find_model(tmp_path).kind == "transformers"
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is unfinished"):
        hub.find_model(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "llm2clip/teacher"}')
    assert hub.find_model(tmp_path).made == "teacher"


def test_names_that_are_no_place_are_refused(tmp_path: Path) -> None:
    for name in ("./here", "/nowhere", "~/x", "a/b/c", " ", str(Path(__file__))):
        with pytest.raises(UsageError, match="is no folder"):
            hub.find_model(name)
    with pytest.raises(UsageError, match=r"is no model: it holds no config\.json"):
        hub.find_model(tmp_path)


@pytest.fixture(params=[False, True], ids=["emulated", "in hardware"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU computes in bf16."""
    monkeypatch.setattr(hub, "cpu_has_bf16", lambda: request.param)
    return bool(request.param)


def test_auto_precision_follows_the_hardware(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.pick_precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")
    assert hub.pick_precision("fp16", CPU) == "fp16"
    assert hub.pick_precision("auto", torch.device("mps")) == "fp32"
    # of an old GPU torch says that it has bf16, unless asked to leave emulation out
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert hub.pick_precision("auto", torch.device("cuda")) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert hub.pick_precision("auto", torch.device("cuda")) == "bf16"


def test_the_device_is_the_gpu_of_the_local_rank_else_apples_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    monkeypatch.setenv("RANK", "5")  # of all machines: not what counts
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert hub.pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert hub.pick_device() == torch.device("cuda", 2)
    there["cuda"] = False
    assert hub.pick_device() == torch.device("mps")
    there["mps"] = False
    assert hub.pick_device() == CPU == hub.pick_device("cpu") == hub.pick_device(CPU)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("gpu", "cuda:99"):
        refused = rf"the device '{name}' cannot be used \(.+\); leave it out or write cpu or mps$"
        with pytest.raises(UsageError, match=refused):
            hub.pick_device(name)


def test_models_saved_in_half_precision_are_used_in_what_the_cpu_computes(
    tiny_llm: Path, finished_student: Path, has_bf16: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    halves = {}
    for dtype in (torch.bfloat16, torch.float16):
        folder = halves[dtype] = tmp_path / str(dtype)
        AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(folder)
    fast = torch.bfloat16 if has_bf16 else torch.float32
    wanted = {torch.bfloat16: fast, torch.float16: torch.float32}  # no CPU here is quick in float16
    for saved, folder in halves.items():
        assert _dtypes(load_teacher(folder, device="cpu")) == {wanted[saved]}
        assert _dtypes(load_teacher(folder, device="cpu", dtype="auto")) == {saved}
        assert _dtypes(load_teacher(folder, device="cpu", dtype=torch.bfloat16)) == {torch.bfloat16}
    half = tmp_path / "student"
    model = LLM2CLIP.from_pretrained(finished_student, device="cpu")
    model.student.to(torch.bfloat16).save_pretrained(half)
    model.transform.save(half)
    assert _dtypes(LLM2CLIP.from_pretrained(half, device="cpu").student) == {fast}
    assert _dtypes(LLM2CLIP.from_pretrained(half, device="cpu", dtype="auto").student) == {torch.bfloat16}
    assert _dtypes(LLM2CLIP.from_pretrained(half, device="cpu", dtype="float16").student) == {torch.float16}


def _dtypes(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.ci
def test_an_export_keeps_the_precision_that_was_saved_and_is_compared_in_a_fast_one(
    tiny_tower: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2clip.export.config import ExportConfig
    from llm2clip.export.run import export_model
    from llm2clip.teacher.model import llm_as_encoder, save

    from .conftest import write_student

    monkeypatch.setattr(hub, "cpu_has_bf16", lambda: False)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    save(llm_as_encoder(tiny_llm, dtype=torch.bfloat16), teacher, attention="two-way")
    student = write_student(tiny_tower, tmp_path / "student")
    settings = ExportConfig(
        model=str(student), teacher=str(teacher), to="sentence-transformers", out=tmp_path / "bundle", device="cpu"
    )
    bundle = export_model(settings)
    by_file = {}
    for path in bundle.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            by_file[str(path.relative_to(bundle))] = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    teachers = [name for name in by_file if "text_0" in name]
    assert teachers and all(by_file[name] == {"BF16"} for name in teachers)
    assert all(found == {"F32"} for name, found in by_file.items() if name not in teachers)
    assert read_manifest(bundle, "export")["checked"]["text"] >= 0.99999


def test_trainings_take_what_the_machine_computes_fast_and_write_it_down(
    tiny_llm: Path, tiny_tower: Path, images_csv: Path, has_bf16: bool, tmp_path: Path
) -> None:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    expected = "bf16" if has_bf16 else "fp32"
    data = (str(images_csv),)
    teacher = train_teacher(TeacherConfig(data=data, model=str(tiny_llm), out=tmp_path / "t", steps=1, batch_size=4))
    assert read_manifest(teacher, "teacher")["config"]["precision"] == expected
    bank = build_bank(BankConfig(data=data, teacher=str(teacher), out=tmp_path / "bank"))
    assert read_manifest(bank, "bank")["teacher"]["precision"] == expected
    run: dict[str, Any] = {"bank": (str(bank),), "tower": str(tiny_tower), "steps": 1, "dim": 8, "workers": 0}
    student = train_student(StudentConfig(**run, out=tmp_path / "s", batch_size=4, tracker="none"))
    assert read_manifest(student, "student")["config"]["precision"] == expected


def test_a_run_goes_on_in_the_precision_it_began_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = StudentConfig(bank=("b",), tower="t", out=tmp_path)
    monkeypatch.setattr(hub, "cpu_has_bf16", lambda: False)
    assert hub.settle_precision(settings, tmp_path).precision == "fp32"
    write_json(tmp_path / "run.json", {"kind": "student", "config": {"precision": "bf16"}})
    assert hub.settle_precision(settings, tmp_path).precision == "bf16"
    asked = StudentConfig(bank=("b",), tower="t", out=tmp_path, precision="fp16")
    assert hub.settle_precision(asked, tmp_path) is asked


def test_the_batch_is_the_papers_or_all_images(
    tiny_llm: Path, tiny_tower: Path, images_csv: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    bank = build_bank(BankConfig(data=(str(images_csv),), teacher=str(tiny_llm), out=tmp_path / "bank"))
    run: dict[str, Any] = {"bank": (str(bank),), "tower": str(tiny_tower), "dim": 8, "workers": 0, "tracker": "none"}
    with caplog.at_level("INFO", "llm2clip"):
        student = train_student(StudentConfig(**run, out=tmp_path / "s", steps=2))
    assert "batches of 24: all images there are, where the paper takes 4096" in caplog.text
    assert read_manifest(student, "student")["config"]["batch_size"] == 24
    assert json.loads((student / "run.json").read_text())["config"]["batch_size"] == 24
    twice = StudentConfig(**{**run, "bank": (str(bank),) * 2}, out=tmp_path / "s2", steps=1)
    assert read_manifest(train_student(twice), "student")["config"]["batch_size"] == 48
    weighted = StudentConfig(**{**run, "bank": (str(bank),) * 2}, bank_weights=(1, 0), out=tmp_path / "s3", steps=1)
    assert read_manifest(train_student(weighted), "student")["config"]["batch_size"] == 24


def test_a_cast_leaves_what_is_not_saved_in_float32(tiny_llm: Path) -> None:
    """An LLM's position frequencies, which transformers too keeps in float32 whatever the weights are loaded in."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_llm, dtype=torch.float32)
    hub.cast(model, CPU, "bfloat16")
    loaded = AutoModel.from_pretrained(tiny_llm, dtype=torch.bfloat16)
    assert {name: b.dtype for name, b in model.named_buffers()} == {name: b.dtype for name, b in loaded.named_buffers()}
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).last_hidden_state, loaded(torch.tensor([[5, 6, 7]]))[0])
