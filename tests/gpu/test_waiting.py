"""What takes long, and so comes last: the real compiler, and exports that a fresh process loads again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip import LLM2CLIP
from llm2clip.artifacts import read_manifest
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.load import load_for_encoding
from llm2clip.bank.verify import cosines
from llm2clip.student.train import train_student
from llm2clip.teacher.model import load_teacher

from .place import gpu_only, losses, verb

pytestmark = pytest.mark.gpu
TEXTS = ["a red disc", "this image shows a small blue square on a dark background .", "a", "圆 🙂"]


@pytest.mark.parametrize("to", ["sentence-transformers", "transformers", "tower"])
def test_export(to: str, finished_student: Path, finished_teacher: Path, images_csv: Path, tmp_path: Path) -> None:
    """Each is loaded again on the device by a fresh process; what it gives is that of the student on the CPU."""
    out, files = tmp_path / to, sorted(images_csv.parent.glob("*.jpg"))[:6]
    verb("export", "--model", finished_student, "--teacher", finished_teacher, "--to", to, "--out", out)
    assert min(read_manifest(out, "export")["checked"].values()) > 0.9999
    source = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    if to == "tower":
        return
    again = LLM2CLIP.from_pretrained(out, finished_teacher if to == "transformers" else None)
    # Float32 throughout, but for the TF32 of the patches' convolution, whose 10 bits are half a thousandth of a number.
    assert cosines(again.encode_image(files), source.encode_image(files)).min() > 0.99999
    assert cosines(again.encode_text(TEXTS), source.encode_text(TEXTS)).min() > 0.99999


@gpu_only("tests/bank/test_encoder.py does so on a CPU, in minutes")
def test_a_compiled_teacher(finished_teacher: Path, device: torch.device) -> None:
    expected, _ = CaptionEncoder(load_teacher(finished_teacher, device="cpu"), dtype="float32").encode(TEXTS)
    teacher = load_for_encoding(str(finished_teacher), device=device, precision="bf16")
    compiled, _ = CaptionEncoder(teacher, dtype="float32", batch_tokens=40, compile=True).encode(TEXTS)
    assert cosines(compiled, expected).min() > 0.999  # bf16, as in test_verbs


@gpu_only("tests/student/test_compile.py does so on a CPU, in minutes")
def test_a_compiled_tower_learns_the_same(student_config: Callable[..., Any], full_precision: None) -> None:
    """In fp32, where dropping other patches than the plain run would be seen."""
    torch._dynamo.reset()
    settings = {"micro_batch_size": 4, "patch_dropout": 0.5, "steps": 2}
    plain, compiled, other = (
        losses(train_student(student_config(name, **settings, **changes)))
        for name, changes in (("plain", {}), ("compiled", {"compile": True}), ("other", {"seed": 1}))
    )
    assert compiled == pytest.approx(plain, abs=1e-4)  # fused operations round otherwise
    assert other != pytest.approx(plain, abs=1e-3)
