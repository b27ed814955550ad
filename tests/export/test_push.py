"""push: what lies on the Hub afterwards opens from there in every library that its card names, and its code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from llm2clip import LLM2CLIP, load_teacher
from llm2clip.artifacts import write_json, write_manifest
from llm2clip.errors import UsageError
from llm2clip.export.card import write_card
from llm2clip.export.check import PROBE_TEXTS, probe_images
from llm2clip.export.config import ExportConfig, PushConfig
from llm2clip.export.format import find_format
from llm2clip.export.push import push
from llm2clip.export.run import facts_of
from llm2clip.teacher.fingerprint import compute_fingerprint, quick_digests, teacher_fingerprint
from tests.loopback_hub import LoopbackHub


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


@pytest.mark.parametrize("to", ["sentence-transformers", "transformers", "tower"])
def test_an_export_opens_from_the_hub(
    to: str, hub: LoopbackHub, finished_student: Path, finished_teacher: Path, tmp_path: Path
) -> None:
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
    assert str(tmp_path).encode() not in b"".join(data for name, data in there.files.items() if name.endswith(".json"))

    card = there.files["README.md"].decode()
    data = ModelCard(card).data
    assert (data.license, data.base_model) == ("other", ["a/tower"])
    assert "| the vision tower | `a/tower` | mit |" in card and f"| the LLM | `{finished_teacher.name}` |" in card
    assert "coco: 5 images, captions: 9 short" in card and '"."' not in card and '("org/made"' in card
    names = run_snippets(card)
    assert len(names) == {"sentence-transformers": 2, "transformers": 1, "tower": 1}[to]
    if to == "sentence-transformers":
        opened = LLM2CLIP.from_pretrained("org/made", device="cpu")
        np.testing.assert_allclose(opened.encode_text(PROBE_TEXTS), model.encode_text(PROBE_TEXTS), atol=1e-5)
        np.testing.assert_allclose(names[0]["text"], names[1]["text"], atol=1e-5)
    if to == "transformers":
        opened = LLM2CLIP.from_pretrained("org/made", finished_teacher, device="cpu")
        np.testing.assert_allclose(opened.encode_image(["cat.jpg"]), names[0]["image"], atol=2e-3)


def test_a_teacher_opens_from_the_hub(hub: LoopbackHub, finished_teacher: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(finished_teacher, tmp_path / "teacher"))
    config = {"model": "org/llm", "attention": "two-way", "tuning": "lora", "epochs": 1}
    scores = {"before": {"cra": 0.1}, "after": {"cra": 0.2}, "probed_on": "held-out captions"}
    facts = {"fingerprint": compute_fingerprint(folder), "files": quick_digests(folder), "dim": 32, **scores}
    write_manifest(folder, "teacher", config=config, **facts)
    for _ in range(2):  # again is no error
        push(PushConfig(folder=folder, name="org/teacher", private=True))
    there = hub.repositories["model", "org/teacher"]
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
