"""Batches that were copied to the device ahead of their use: those of the CPU, and never overwritten in use."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankConfig
from llm2clip.bank.reader import Bank
from llm2clip.student import loader as loader_module
from llm2clip.student.data import BankDataset, Batch
from llm2clip.student.loader import BankLoader
from llm2clip.student.transform import ImageTransform

from .place import ON_GPU, gpu_only

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[3, 64], ids=["several-chunks", "one-chunk"])
def dataset(request: Any, bank: Path, tiny_tower: Path, monkeypatch: pytest.MonkeyPatch) -> BankDataset:
    """Batches of eight images and sixteen captions, read by the chunk or whole."""
    monkeypatch.setattr(loader_module, "CHUNK", request.param)
    transform = ImageTransform.from_pretrained(tiny_tower)
    return BankDataset([Bank.open(bank)], transform=transform, batch_size=8, captions_per_image=2)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cpu(workers: int, dataset: BankDataset, device: torch.device) -> None:
    expected = list(BankLoader(dataset).batches(0, 7))
    loader = BankLoader(dataset, workers=workers, device=device)
    number = 0
    for batch in loader.batches(0, 7):
        assert all(tensor.device.type == device.type for tensor in batch.tensors())
        assert same(batch, expected[number])
        number += 1
        del batch
    assert number == 7 and loader.seen == 56


@gpu_only("a CPU does what it is told before it is told the next thing")
def test_a_batch_in_use_is_not_overwritten(dataset: BankDataset, device: torch.device) -> None:
    """The step lags behind, as it does in training: a batch is let go before the device has read it."""
    expected = list(BankLoader(dataset).batches(0, 8))
    kept = []
    for batch in BankLoader(dataset, device=device).batches(0, 8):
        torch.cuda._sleep(50_000_000)  # clock cycles, some 30 ms, in which the next ones are read and sent
        kept.append(batch.map(torch.clone))
        del batch
    assert all(same(one, other) for one, other in zip(kept, expected, strict=True))


@gpu_only("nothing is copied ahead on a CPU")
def test_two_batches_are_held_and_not_three(bank: Path, tiny_tower: Path, device: torch.device) -> None:
    transform = ImageTransform.from_pretrained(tiny_tower).at_size(512)
    dataset = BankDataset([Bank.open(bank)], transform=transform, batch_size=8)
    size = 8 * 4 * 512 * 512
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for batch in BankLoader(dataset, device=device).batches(0, 5):
        del batch
    assert 2 * size <= torch.cuda.max_memory_allocated() - before < 3 * size


def test_a_image_that_cannot_be_read_is_replaced_alike(
    finished_teacher: Path, device: torch.device, tiny_tower: Path, tmp_path: Path
) -> None:
    rows = ["image,caption", *(f"{i}.png,a red disc {i}" for i in range(12))]
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    for i in range(12):
        Image.new("RGB", (40, 32), (20 * i, 9 * i, 100)).save(tmp_path / f"{i}.png")
    settings = {"data": (str(tmp_path / "captions.csv"),), "teacher": str(finished_teacher), "precision": "fp32"}
    bank = Bank.open(build_bank(BankConfig(**settings, out=tmp_path / "bank")))
    (tmp_path / "5.png").write_bytes(b"no image")
    dataset = BankDataset([bank], transform=ImageTransform.from_pretrained(tiny_tower), batch_size=12)
    loaders = [BankLoader(dataset, device=place, max_bad_fraction=0.5) for place in ("cpu", device)]
    (one,), (other,) = ([*loader.batches(0, 1)] for loader in loaders)
    assert same(one, other) and loaders[0].state() == loaders[1].state()
    assert loaders[1].bad.num_bad == 1 and (other.packed.is_cuda or not ON_GPU)
