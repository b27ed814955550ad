"""--to onnx: both graphs give the model's vectors at any number of rows, and the card's code runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip import LLM2CLIP, ExportConfig
from llm2clip.artifacts import read_manifest
from llm2clip.errors import UsageError
from llm2clip.export.check import probe_images
from llm2clip.export.formats import onnx
from llm2clip.export.run import export_model
from tests.student import released as small


def test_without_the_extra_it_is_told_in_a_line(
    finished_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else plain(name, *a)
    )
    with pytest.raises(UsageError, match=r"to='onnx' needs .*onnxruntime: pip install 'llm2clip\[onnx\]'"):
        export_model(ExportConfig(model=str(finished_student), to="onnx", out=tmp_path / "out"))


def test_no_place_of_this_machine_is_in_the_graphs(finished_student: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx.write(LLM2CLIP.from_pretrained(finished_student, device="cpu"), tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"image.onnx", "text.onnx"} <= set(files)
    places = [Path(onnx.__file__).parents[2], Path(torch.__file__).parents[1], finished_student.parent]
    for name, content in files.items():
        assert not [place for place in places if str(place).encode() in content], name
        assert b"site-packages" not in content and b"stack_trace" not in content, name


@pytest.mark.ci
@pytest.mark.parametrize("layout", ["ours", "openai", "eva02", "siglip2"])
def test_both_graphs_are_the_model(
    layout: str, finished_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if layout in ("eva02", "siglip2"):
        pytest.importorskip("timm")
    source = finished_student if layout == "ours" else small.write_checkpoint(tmp_path, layout)
    out = export_model(ExportConfig(model=str(source), to="onnx", out=tmp_path / "out", device="cpu"))
    assert min(read_manifest(out, "export")["checked"].values()) > 0.9999
    model = LLM2CLIP.from_pretrained(source, device="cpu")
    text = onnxruntime.InferenceSession(out / "text.onnx")
    for rows in (1, 2, 5):
        vectors = torch.randn(rows, model.student.config.teacher_dim)
        with torch.inference_mode():
            wanted = torch.nn.functional.normalize(model.student.get_text_features(vectors), dim=-1)
        np.testing.assert_allclose(text.run(None, {"text_embeds": vectors.numpy()})[0], wanted, atol=1e-4)
    probe_images()[0].save(out / "cat.jpg")
    monkeypatch.chdir(out)
    names: dict[str, np.ndarray] = {}
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), names)
    assert (names["image"] @ model.encode_image(["cat.jpg"]).T).min() > 0.999
