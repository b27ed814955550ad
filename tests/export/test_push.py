"""push: what lies on the Hub afterwards opens from there in every library that its card names, and its code runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from llm2clip import LLM2CLIP, load_teacher
from llm2clip.artifacts import write_json, write_manifest
from llm2clip.errors import UsageError
from llm2clip.export.card import llm_of, write_card
from llm2clip.export.check import PROBE_TEXTS, probe_images
from llm2clip.export.config import ExportConfig, PushConfig
from llm2clip.export.format import find_format
from llm2clip.export.push import push
from llm2clip.export.run import facts_of
from llm2clip.teacher.fingerprint import compute_fingerprint, quick_digests, teacher_fingerprint
from tests.loopback_hub import LoopbackHub, Repository


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_cat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    probe_images()[0].save("cat.jpg")


def run_snippets(card: str) -> list[dict[str, Any]]:
    """What the names in each piece of Python on a card stand for after it has run."""
    found = []
    for code in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
        found.append(names)
    return found


def pushed_places(there: Repository, *places: Path) -> list[tuple[str, str]]:
    """Each file on the Hub that has one of these places of this machine in its bytes, and the place."""
    return [(name, str(place)) for name, data in there.files.items() for place in places if str(place).encode() in data]


@pytest.mark.parametrize("to", ["sentence-transformers", "transformers", "tower", "onnx"])
def test_an_export_opens_from_the_hub(
    to: str, hub: LoopbackHub, finished_student: Path, finished_teacher: Path, tiny_tower: Path, tmp_path: Path
) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    hub.add("a/tower", {"README.md": b"---\nlicense: mit\n---\n"})
    model = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    config = ExportConfig(model=str(finished_student), teacher=str(finished_teacher), to=to, out=tmp_path / "out")
    form, facts = find_format(to), facts_of(model, config)
    config.out.mkdir()
    form.write(model, config.out)
    write_card(config.out, form, facts, scores={"coco/i2t_r@1": 0.5}, protocol=["coco: 5 images, captions: 9 short"])
    write_json(config.out / "run.json", {"kind": "export", "config": {}})
    write_manifest(config.out, "export", config=config.settings(), **facts)
    before = {path.name: path.read_bytes() for path in config.out.iterdir() if path.is_file()}

    url = push(PushConfig(folder=config.out, name="org/made"))
    assert url == f"{hub.endpoint}/org/made"
    there = hub.repositories["model", "org/made"]
    assert not there.private and "run.json" not in there.files
    assert {path.name: path.read_bytes() for path in config.out.iterdir() if path.is_file()} == before
    assert there.files.keys() >= before.keys() - {"run.json"}
    assert not pushed_places(there, tmp_path, finished_student.parent, finished_teacher.parent, tiny_tower.parent)

    card = there.files["README.md"].decode()
    data = ModelCard(card).data
    assert (data.license, data.base_model) == ("other", ["a/tower"])
    assert (
        "| the vision tower | `a/tower` | mit |" in card
        and "| the LLM | a model that is not on the Hub | not stated |" in card
    )
    assert "| tower | `a/tower (clip_vision_model)` |" in card and "| LLM of the teacher |" not in card
    assert "coco: 5 images, captions: 9 short" in card and '"."' not in card and '("org/made"' in card
    names = run_snippets(card)
    assert len(names) == {"sentence-transformers": 2, "transformers": 1, "tower": 1, "onnx": 1}[to]
    if to == "sentence-transformers":
        opened = LLM2CLIP.from_pretrained("org/made", device="cpu")
        np.testing.assert_allclose(opened.encode_text(PROBE_TEXTS), model.encode_text(PROBE_TEXTS), atol=1e-5)
        np.testing.assert_allclose(names[0]["text"], names[1]["text"], atol=1e-5)
    if to == "transformers":
        opened = LLM2CLIP.from_pretrained("org/made", finished_teacher, device="cpu")
        np.testing.assert_allclose(opened.encode_image(["cat.jpg"]), names[0]["image"], atol=2e-3)


def test_a_teacher_opens_from_the_hub(hub: LoopbackHub, finished_teacher: Path, tiny_llm: Path, tmp_path: Path) -> None:
    hub.add("org/llm", {"config.json": b"{}"})
    folder = Path(shutil.copytree(finished_teacher, tmp_path / "teacher"))
    config = {"model": "org/llm", "attention": "two-way", "tuning": "lora", "epochs": 1}
    scores = {"before": {"cra": 0.1}, "after": {"cra": 0.2}, "probed_on": "held-out captions"}
    facts = {"fingerprint": compute_fingerprint(folder), "files": quick_digests(folder), "dim": 32, **scores}
    write_manifest(folder, "teacher", config=config, **facts)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_llm)}))
    for _ in range(2):  # again is no error
        push(PushConfig(folder=folder, name="org/teacher", private=True))
    there = hub.repositories["model", "org/teacher"]
    assert not [name for name in there.files if name.startswith("adapter/")]
    assert not pushed_places(there, tmp_path, finished_teacher.parent, tiny_llm.parent)
    card = there.files["README.md"].decode()
    assert (
        there.private and "| the LLM | `org/llm` | not stated; see its page |" in card and "| cra | 0.1 | 0.2 |" in card
    )
    assert ModelCard(card).data.base_model == ["org/llm"]
    sentence, ours = run_snippets(card)
    np.testing.assert_array_equal(sentence["model"].encode(["a"]), ours["teacher"].encode(["a"]))
    assert teacher_fingerprint(load_teacher("org/teacher", device="cpu")) == facts["fingerprint"]


def test_what_cannot_be_pushed(
    hub: LoopbackHub, finished_student: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, words in (
        (finished_student, r"found: student.; write it by llm2clip export first"),
        (tiny_llm, r"found: no manifest.; give an export or a teacher"),
        (tmp_path / "none", "is no folder"),
    ):
        with pytest.raises(UsageError, match=words):
            push(PushConfig(folder=folder, name="org/made"))
    with pytest.raises(UsageError, match="is no name on the Hub; give org/name"):
        PushConfig(folder=finished_student, name="made")
    assert not hub.repositories and not hub.requests
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "manifest.json").write_text(
        json.dumps({"format": "llm2clip/teacher", "dim": 3, "config": {"model": "x"}})
    )
    hub.close_writing = True
    with pytest.raises(UsageError, match=r"org/made cannot be written on the Hub \(.*hf auth login") as error:
        push(PushConfig(folder=folder, name="org/made"))
    assert "\n" not in str(error.value)


def small_teacher(folder: Path, config: dict[str, Any], **facts: Any) -> Path:
    """A folder of a manifest alone that says it is a teacher."""
    folder.mkdir()
    write_manifest(folder, "teacher", config=config, fingerprint="0123", dim=3, **facts)
    return folder


def small_export(folder: Path, **facts: Any) -> Path:
    """A folder of a manifest and a card that says it is an export."""
    folder.mkdir()
    given = {"to": "tower", "dim": 24, "tower_type": "clip_vision_model", "image_size": [32, 32], **facts}
    write_card(
        folder, find_format("tower"), {"tower_class": "CLIPVisionModel", "load_options": {}, **given}, scores=None
    )
    write_manifest(folder, "export", config={"model": "/home/me/student", "teacher": "runs/teacher"}, **given)
    return folder


def test_private_is_not_written_into_what_is_public(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = small_teacher(tmp_path / "teacher", {"model": "org/llm"})
    there = hub.add("org/made", {"README.md": b"before"})
    with pytest.raises(UsageError, match="org/made is on the Hub and public, so private cannot hold") as error:
        push(PushConfig(folder=folder, name="org/made", private=True))
    assert "\n" not in str(error.value) and there.files == {"README.md": b"before"} and not there.private
    push(PushConfig(folder=folder, name="org/made"))
    assert "manifest.json" in there.files


def test_what_an_earlier_push_left_is_taken_out_in_the_same_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    there = hub.add("org/made", {".gitattributes": b"*", "modules.json": b"[]", "0_Transformer/config.json": b"{}"})
    push(PushConfig(folder=small_teacher(tmp_path / "teacher", {"model": "org/llm"}), name="org/made"))
    assert set(there.files) == {".gitattributes", "README.md", "manifest.json"}
    assert len([path for method, path in hub.requests if "/commit/" in path]) == 1


def test_settings_that_are_places_stay_here(hub: LoopbackHub, tmp_path: Path) -> None:
    settings = {
        "data": ["captions=/home/me/b.csv", "file:///home/me/shards"],
        "instructions": {"/home/me/nli.jsonl": "as in /home/me/notes"},
        "text_pairs": ["runs/pairs.jsonl"],
        "model": "runs/llm",
        "attention": "two-way",
        "learning_rate": 2e-4,
    }
    bad = {"first": ["cannot read /home/me/a.jpg"]}
    folder = small_teacher(tmp_path / "teacher", settings, before={"cra": 0.1}, after={"cra": 0.2}, bad=bad)
    push(PushConfig(folder=folder, name="org/teacher"))
    there = hub.repositories["model", "org/teacher"]
    manifest = json.loads(there.files["manifest.json"])
    assert manifest["config"] == {"attention": "two-way", "learning_rate": 2e-4}
    assert (manifest["fingerprint"], manifest["dim"], manifest["after"]) == ("0123", 3, {"cra": 0.2})
    assert not pushed_places(there, Path("/home/me"), Path("runs"))
    card = ModelCard(there.files["README.md"].decode())
    assert card.data.base_model is None and "Made of a model that is not on the Hub, attention two-way" in card.text
    assert "| the LLM | a model that is not on the Hub | not stated |" in card.text


def test_a_folder_that_looks_like_a_name_is_no_base_model(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/student", {"README.md": b"---\nlicense: mit\n---\n"})
    facts = {"tower": "runs/tower", "tower_revision": "runs", "llm": "runs/llm", "source": f"org/student@{40 * 'a'}"}
    push(PushConfig(folder=small_export(tmp_path / "out", **facts, prompt="a: "), name="org/made"))
    there = hub.repositories["model", "org/made"]
    manifest = json.loads(there.files["manifest.json"])
    assert (manifest["source"], manifest["prompt"], manifest["config"]) == (facts["source"], "a: ", {})
    assert not pushed_places(there, Path("runs"), Path("/home/me"))
    card = ModelCard(there.files["README.md"].decode())
    assert card.data.base_model == ["org/student"] and "| the student | `org/student` | mit |" in card.text
    assert f"| student | `{facts['source']}` |" in card.text and "`unknown (clip_vision_model)`" in card.text


def test_each_member_of_a_joined_teacher_has_its_row(hub: LoopbackHub, tmp_path: Path) -> None:
    for name, licence in (("org/a", b"mit"), ("org/b", b"apache-2.0")):
        hub.add(name, {"README.md": b"---\nlicense: " + licence + b"\n---\n"})
    names = ["org/a", "org/b", "runs/c"]
    rows = ["`org/a` | mit |", "`org/b` | apache-2.0 |", "a model that is not on the Hub | not stated |"]
    members = [{"name": name, "fingerprint": "1", "dim": 1} for name in names]
    joined = small_teacher(tmp_path / "joined", {"teachers": names, "weights": [1, 1, 1]}, members=members)
    assert llm_of(str(joined)) == names
    # exports of before had the members in one string
    for i, llm in enumerate((names, ", ".join(names))):
        small_export(tmp_path / f"out{i}", llm=llm)
    for folder in ("joined", "out0", "out1"):
        push(PushConfig(folder=tmp_path / folder, name=f"org/{folder}"))
        there = hub.repositories["model", f"org/{folder}"]
        card = ModelCard(there.files["README.md"].decode())
        assert card.data.base_model == ["org/a", "org/b"] and not pushed_places(there, Path("runs"))
        assert [row for row in rows if f"| a member of the teacher | {row}" in card.text] == rows
    again = tmp_path / "again"
    again.mkdir()
    (again / "manifest.json").write_bytes(hub.repositories["model", "org/joined"].files["manifest.json"])
    push(PushConfig(folder=again, name="org/again"))
    card = ModelCard(hub.repositories["model", "org/again"].files["README.md"].decode())
    assert card.data.base_model == llm_of(str(again)) == ["org/a", "org/b"]
    assert "Made of `org/a`, `org/b`," in hub.repositories["model", "org/joined"].files["README.md"].decode()
