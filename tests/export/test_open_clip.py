"""--to open-clip: open_clip opens the folder and gives the same image vectors; what it cannot hold is one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llm2clip import LLM2CLIP, ExportConfig
from llm2clip.artifacts import read_manifest
from llm2clip.errors import UsageError
from llm2clip.export.check import probe_images
from llm2clip.export.run import export_model
from llm2clip.student.start import start_student
from tests.conftest import write_student
from tests.student import released as small

pytest.importorskip("open_clip")


@pytest.mark.parametrize("layout", ["ours", "openai"])
def test_clip_opens_in_open_clip(
    layout: str,
    finished_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = finished_student if layout == "ours" else small.write_checkpoint(tmp_path, layout)
    out = export_model(ExportConfig(model=str(source), to="open-clip", out=tmp_path / "out", device="cpu"))
    assert read_manifest(out, "export")["checked"]["image"] > 0.9999
    probe_images()[0].save(out / "cat.jpg")
    monkeypatch.chdir(out)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    dim = LLM2CLIP.from_pretrained(source, device="cpu").dim
    assert f"torch.Size([1, {dim}])" in capsys.readouterr().out


@pytest.mark.ci
def test_a_timm_tower_of_timms_own_sizes(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    import transformers

    torch.manual_seed(0)
    transformers.TimmWrapperModel(
        transformers.TimmWrapperConfig(architecture="eva02_tiny_patch14_224")
    ).save_pretrained(tmp_path / "tower")
    transformers.CLIPImageProcessor().save_pretrained(tmp_path / "tower")
    student = write_student(tmp_path / "tower", tmp_path / "student")
    out = export_model(ExportConfig(model=str(student), to="open-clip", out=tmp_path / "out", device="cpu"))
    assert read_manifest(out, "export")["checked"]["image"] > 0.9999


def test_what_open_clip_cannot_hold(tmp_path: Path) -> None:
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    transformers.Dinov2Model(transformers.Dinov2Config(**shape)).save_pretrained(tmp_path / "dinov2")
    student = start_student(str(tmp_path / "dinov2"), teacher_dim=8, projection_dim=4)
    from llm2clip.export.formats.open_clip import model_config, preprocess_config, write
    from llm2clip.student.transform import ImageTransform

    model = LLM2CLIP(student, ImageTransform(image_size=(32, 32), resize=40))
    with pytest.raises(UsageError, match=r"no tower as this one .dinov2.; take to='onnx'"):
        model_config(model)
    with pytest.raises(UsageError, match="resized to 40 and cropped to 32"):
        preprocess_config(model)
    pytest.importorskip("timm")
    sizes = {"img_size": 28, "depth": 1, "embed_dim": 48, "num_heads": 4}
    config = transformers.TimmWrapperConfig(architecture="eva02_tiny_patch14_224", model_args=sizes)
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path / "timm")
    student = start_student(str(tmp_path / "timm"), teacher_dim=8, projection_dim=4)
    with pytest.raises(UsageError, match="with other sizes"):
        write(LLM2CLIP(student, ImageTransform(image_size=(28, 28), resize=28)), tmp_path)
