"""The lines of README.md as who has just installed llm2clip runs them: a fresh process, empty caches, a Hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm2clip import LLM2CLIP
from llm2clip import released as table
from llm2clip.export.check import probe_images
from tests.loopback_hub import LoopbackHub
from tests.student import released as small

README = Path(__file__).parents[1] / "README.md"
NAME = "microsoft/LLM2CLIP-Openai-L-14-336"


@pytest.mark.slow
def test_a_released_student_in_three_lines(hub_server: LoopbackHub, finished_teacher: Path, tmp_path: Path) -> None:
    """Online, and then from the cache without a Hub; no code of the repository is run."""
    student = small.write_checkpoint(tmp_path, "openai")
    files = {path.name: path.read_bytes() for path in student.iterdir()}
    more = {"modeling_clip.py": b"raise SystemExit('remote code was run')", "pytorch_model.bin": b"no weights"}
    hub_server.repositories.clear()
    hub_server.forget()
    hub_server.add(NAME, {**files, **more})
    hub_server.add(table.LLAMA_8B, finished_teacher)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = [snippet for snippet in snippets if NAME in snippet]
    assert len([line for line in code.splitlines() if line]) == 3
    work = tmp_path / "work"
    work.mkdir()
    probe_images()[0].save(work / "cat.jpg")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub_server.endpoint,
    }
    said = []
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **offline},
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(float(re.fullmatch(r"\[\[(.+)\]\]\n", done.stdout)[1]))
        asked = hub_server.sent(NAME)
        assert {"config.json", "model.safetensors"} <= asked and "pytorch_model.bin" not in asked
        hub_server.repositories.clear()
    model = LLM2CLIP.from_pretrained(student, finished_teacher, device="cpu")
    image = model.encode_image([work / "cat.jpg"])
    expected = float((model.encode_text(["a grey cat asleep on a sofa"]) @ image.T)[0, 0])
    assert said == pytest.approx([expected, expected], abs=1e-5) and expected
