"""What a GPU computes is what a CPU computes: teacher, bank, loss, student, training, scores and exports, in fp32.

The tolerances are those of float32 sums in another order: 24 bits, so 6e-8 a number, times some tens for the operations
that follow each other in models of two layers.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip import LLM2CLIP
from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankConfig
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.load import use_flash_attention
from llm2clip.bank.reader import Bank
from llm2clip.bank.verify import cosines
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.run import evaluate
from llm2clip.export.check import probe_images
from llm2clip.export.config import ExportConfig
from llm2clip.export.run import export_model
from llm2clip.metrics import caption_retrieval_accuracy, recall_both_ways
from llm2clip.student.loss import contrastive_loss
from llm2clip.student.model import Student
from llm2clip.student.train import train_student
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.loss import pair_loss
from llm2clip.teacher.model import load_teacher
from llm2clip.teacher.train import train_teacher
from llm2clip.teacher.trainer import Arguments

from .place import gpu_only, losses, on_the_cpu, on_the_device

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_precision")]
TEXTS = ["a red disc", "this image shows a small blue square on a dark background .", "a", "圆 🙂"] * 3


def test_teacher(finished_teacher: Path, device: torch.device) -> None:
    on_cpu, there = (load_teacher(finished_teacher, device=place) for place in ("cpu", device))
    np.testing.assert_allclose(there.encode(TEXTS), on_cpu.encode(TEXTS), atol=1e-5)
    vectors, tokens = CaptionEncoder(there, dtype="float32", batch_tokens=40).encode(TEXTS)
    expected, counts = CaptionEncoder(on_cpu, dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert tokens.tolist() == counts.tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_bank(dtype: str, finished_teacher: Path, images_csv: Path, device: torch.device, tmp_path: Path) -> None:
    """Packed on the device. Rounding may go the other way there: by a step of what is stored, of 2^-7 for bfloat16."""
    settings = {"data": (str(images_csv),), "teacher": str(finished_teacher), "precision": "fp32", "shard_rows": 10}
    banks = [
        Bank.open(build_bank(BankConfig(**settings, dtype=dtype, device=str(place), out=tmp_path / f"{i}")))
        for i, place in enumerate(("cpu", device))
    ]
    rows = np.arange(banks[0].num_rows)
    assert banks[0].num_rows == banks[1].num_rows == 48
    assert list(banks[0].table.texts(rows)) == list(banks[1].table.texts(rows))
    on_cpu, there = (bank.vectors(rows).astype(np.float32) for bank in banks)
    step = {"float16": 1e-3, "float32": 1e-5, "bfloat16": 8e-3, "int8": 1e-5}[dtype]
    block = np.abs(on_cpu).max() / 127 if dtype == "int8" else 0.0
    np.testing.assert_allclose(there, on_cpu, rtol=step, atol=1e-5 + block)
    assert cosines(on_cpu, there).min() > 0.9999


LOSSES: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"kind": "sigmoid"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_contrastive_loss(options: dict, dtype: torch.dtype, device: torch.device) -> None:
    """Its value and all its derivatives, in tiles of several sizes. Half vectors are computed with in fp32."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 32, generator=generator) for n in (40, 80))
    vectors = [torch.nn.functional.normalize(v, dim=-1).to(dtype) for v in (image, text)]
    rows = torch.randint(60, (80,), generator=generator)
    scalars = [torch.tensor(14.0), *([torch.tensor(-10.0)] if options.get("kind") == "sigmoid" else [])]
    results = []
    for place, tile in (("cpu", 64), (device, 16), (device, None)):
        inputs = [value.to(place, copy=True).requires_grad_() for value in (*vectors, *scalars)]
        bias = inputs[3] if len(inputs) > 3 else None
        loss = contrastive_loss(*inputs[:3], bias=bias, tile=tile, rows=rows.to(place), **options)
        loss.backward()
        results.append(
            [value.detach().float().cpu() for value in (loss, *(i.grad for i in inputs if i.grad is not None))]
        )
    for there in results[1:]:
        assert len(there) == len(inputs) + 1
        for found, expected in zip(there, results[0], strict=True):
            close = 1e-5 if dtype == torch.float32 else 1e-2  # the derivatives are given back in the vectors' dtype
            assert (found - expected).norm() <= close * expected.norm() + 1e-7


def test_pair_loss(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(12, 16, generator=generator) for _ in range(3)]
    labels = torch.randint(9, (12, 6), generator=generator)
    results = []
    for place in ("cpu", device):
        inputs = [column.to(place, copy=True).requires_grad_() for column in columns]
        loss = pair_loss(inputs, labels.to(place), scale=50.0)
        loss.backward()
        results.append([loss.detach().cpu(), *(column.grad.cpu() for column in inputs)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_student(finished_student: Path, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    embeds = torch.randn(6, 32, generator=generator)
    results = []
    for place in ("cpu", device):
        student = Student.from_pretrained(finished_student).to(place).train()
        image, text, scale = student(pixels.to(place), embeds.to(place))
        contrastive_loss(image, text, scale).backward()
        grads = {name: parameter.grad.cpu() for name, parameter in student.named_parameters()}
        results.append((image.detach().cpu(), text.detach().cpu(), grads))
    for i in (0, 1):
        torch.testing.assert_close(results[1][i], results[0][i], rtol=0, atol=1e-5)
    largest = max(gradient.norm() for gradient in results[0][2].values())
    for name, expected in results[0][2].items():  # k_proj.bias has none but rounding
        assert (results[1][2][name] - expected).norm() < 1e-4 * max(expected.norm(), 1e-2 * largest), name


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"micro_batch_size": 3, "ema": 0.9, "captions_per_image": 2}, 1e-4),
        ({"loss": "sigmoid", "accumulate": 2, "lora_rank": 2, "workers": 2}, 1e-4),
        ({"optimizer": "muon", "gradient_checkpointing": True, "warmup_steps": 2}, 1e-2),  # in bf16, see test_training
        ({"unlocked_blocks": 1, "label_smoothing": 0.1, "adaptor_warmup_steps": 3}, 1e-4),
    ],
    ids=str,
)
def test_training_a_student(settings: dict, tolerance: float, student_config: Callable[..., Any]) -> None:
    """Adam takes steps of full size also where a gradient is all rounding, which adds to that of the loss itself."""
    with on_the_cpu():
        on_cpu = losses(train_student(student_config("cpu", **settings)))
    with on_the_device():
        there = losses(train_student(student_config("there", **settings)))
    assert len(there) == 6 and there == pytest.approx(on_cpu, rel=tolerance)
    assert abs(there[-1] - there[0]) > 10 * tolerance * there[0], "nothing was learned that could differ"


@pytest.mark.parametrize("settings", [{"micro_batch_size": 8}, {"tuning": "full", "learning_rate": 1e-3}], ids=str)
def test_training_a_teacher(settings: dict, tiny_llm: Path, images_csv: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"data": (str(images_csv),), "model": str(tiny_llm), "steps": 6, "batch_size": 6}
    shared |= {"precision": "fp32", "learning_rate": 5e-3, "lora_dropout": 0.0, **settings}
    with on_the_cpu():
        on_cpu = losses(train_teacher(TeacherConfig(**shared, out=tmp_path / "cpu")))
    with on_the_device():
        there = losses(train_teacher(TeacherConfig(**shared, out=tmp_path / "there")))
    # cosines times 50: their rounding counts 50 times, and what it does to Adam's steps
    assert len(there) == 6 and there == pytest.approx(on_cpu, rel=1e-3)
    assert abs(there[-1] - there[0]) > 1e-2 * there[0], "nothing was learned that could differ"


def test_scores(device: torch.device) -> None:
    """Ranks are whole numbers: rounding may change that of one among 300, whose scores are equal but for it."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(300, 24, generator=generator), torch.randn(600, 24, generator=generator)
    owners = np.arange(600) // 2
    text += 0.5 * image[owners]
    for values in ((image, text), (image.half(), text.half())):
        there = [value.to(device) for value in values]
        ids, one = np.arange(300), 1 / 300 + 1e-9
        for found, wanted in zip(*(recall_both_ways(*both, ids, owners) for both in (there, values)), strict=True):
            assert 0.05 < wanted[1] < 0.95 and found == pytest.approx(wanted, abs=one)
        for pool in ("all", "second"):
            expected = caption_retrieval_accuracy(values[1], owners, pool)
            assert caption_retrieval_accuracy(there[1], owners, pool) == pytest.approx(expected, abs=one)


def test_reports(finished_student: Path, finished_teacher: Path, images_csv: Path, tmp_path: Path) -> None:
    settings = {"model": str(finished_student), "teacher": str(finished_teacher), "data": (str(images_csv),)}
    on_cpu = evaluate(EvaluateConfig(**settings, out=tmp_path / "cpu", device="cpu"))
    with on_the_device():
        there = evaluate(EvaluateConfig(**settings, out=tmp_path / "there"))
    # an untrained student finds many alike: one in 24 may change places with its neighbour
    assert there["metrics"] == pytest.approx(on_cpu["metrics"], abs=1 / 24 + 1e-9)
    profiles = [report["similarity"]["captions"] for report in (on_cpu, there)]
    for name in ("alignment", "uniformity", "positive_mean", "negative_mean"):
        assert profiles[1][name] == pytest.approx(profiles[0][name], abs=1e-5)


def test_exports(
    finished_student: Path,
    finished_teacher: Path,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One written by way of the device holds the same bytes, and leaves its memory to the process that tries it."""
    from llm2clip.export.formats import tower

    held: list[int] = []

    def watched(*words: Any) -> Any:
        held.append(torch.cuda.memory_reserved() - before)
        return tower.reload(*words)

    monkeypatch.setattr(tower, "FORMAT", dataclasses.replace(tower.FORMAT, reload=watched))
    # What torch needs for any product stays, so it is there before the count begins.
    LLM2CLIP.from_pretrained(finished_student, device=device).encode_image(probe_images())
    gc.collect()
    torch.cuda.empty_cache()
    before, folders = torch.cuda.memory_reserved(), []
    for place in ("cpu", str(device)):
        options = {"model": str(finished_student), "device": place, "to": "tower", "out": tmp_path / place}
        folders.append(export_model(ExportConfig(**options)))
    names = ("model.safetensors", "config.json")
    assert all((folders[0] / name).read_bytes() == (folders[-1] / name).read_bytes() for name in names)
    assert max(held) <= 0, "torch kept the memory of a model that was let go"
    checked = json.loads((folders[-1] / "manifest.json").read_text())["checked"]
    assert min(checked.values()) > 0.99999


def test_a_model_in_use(finished_student: Path, finished_teacher: Path, images_csv: Path) -> None:
    files = sorted(images_csv.parent.glob("*.jpg"))
    on_cpu = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    with on_the_device():
        there = LLM2CLIP.from_pretrained(finished_student, finished_teacher)
        image, text = there.encode_image(files, batch_size=7), there.encode_text(TEXTS)
    np.testing.assert_allclose(image, on_cpu.encode_image(files), atol=1e-5)
    np.testing.assert_allclose(text, on_cpu.encode_text(TEXTS), atol=1e-5)


@gpu_only("flash attention has no kernel for a CPU; tests/bank/test_flash.py stands in for it there")
def test_flash_attention(finished_teacher: Path, device: torch.device) -> None:
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    plain = load_teacher(finished_teacher, device=device, dtype=torch.bfloat16)
    expected, counts = CaptionEncoder(plain, dtype="float32").encode(TEXTS)
    flash = load_teacher(finished_teacher, device=device, dtype=torch.bfloat16)
    assert use_flash_attention(flash)
    encoder = CaptionEncoder(flash, dtype="float32", batch_tokens=40)
    vectors, tokens = encoder.encode(TEXTS)
    assert encoder.varlen and tokens.tolist() == counts.tolist()
    assert cosines(vectors, expected).min() > 0.999


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_teacher_in_4_bits(tiny_llm: Path, images_csv: Path, tmp_path: Path) -> None:
    """Adapters trained beside weights of 4 bits are merged into the full ones."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = tmp_path / "wide"  # bitsandbytes packs 64 by 64
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llm, hidden_size=64, intermediate_size=128)).save_pretrained(wide)
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(wide)
    shared = {"data": (str(images_csv),), "model": str(wide), "steps": 8, "batch_size": 8, "learning_rate": 1e-2}
    with on_the_device():
        out = train_teacher(TeacherConfig(**shared, quantize=True, precision="bf16", out=tmp_path / "teacher"))
    told = losses(out)
    assert sum(told[-3:]) < sum(told[:3])
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert np.isfinite(load_teacher(out, device="cpu").encode(TEXTS)).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu(finished_teacher: Path, tiny_llm: Path, images_csv: Path, tmp_path: Path) -> None:
    """Vectors on their way from another GPU than the first are waited for; a trainer stays on one."""
    vectors = []
    for i in (0, 1):
        encoder = CaptionEncoder(load_teacher(finished_teacher, device=f"cuda:{i}"), dtype="float32", batch_tokens=40)
        with torch.cuda.device(i):
            torch.cuda._sleep(50_000_000)  # clock cycles, some 30 ms, in which what is not waited for is not there
        vectors.append(encoder.encode(TEXTS)[0])
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5)
    settings = {"data": (str(images_csv),), "model": str(tiny_llm), "precision": "fp32", "steps": 2, "batch_size": 4}
    train_teacher(TeacherConfig(**settings, mntp=True, mntp_steps=2, mntp_batch_size=4, out=tmp_path / "teacher"))


def test_a_trainer_stays_on_one_device(tmp_path: Path) -> None:
    arguments = Arguments(output_dir=str(tmp_path), use_cpu=not torch.cuda.is_available())
    number = arguments.n_gpu
    assert number == min(1, torch.cuda.device_count())
    arguments._n_gpu = 4  # as without torchrun on a machine of four
    assert arguments.n_gpu == 1
