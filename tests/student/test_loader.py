"""The loader hands out the same batches with any number of workers and processes, and counts what was bad."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from llm2clip.bank.reader import Bank
from llm2clip.errors import LLM2CLIPError, SourceError, TooManyBadSamples
from llm2clip.student import loader as loader_module
from llm2clip.student.data import BankDataset, Batch
from llm2clip.student.loader import BankLoader

from .banks import image_samples, write_test_bank
from .test_data import TRANSFORM, damaged, equal


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("loader")
    return write_test_bank(folder / "bank", image_samples(folder / "images", 40))


def dataset_of(bank: Bank, batch_size: int = 8, num_processes: int = 1) -> BankDataset:
    return BankDataset([bank], transform=TRANSFORM, batch_size=batch_size, num_processes=num_processes)


def same(ones: list[Batch], others: list[Batch]) -> bool:
    return len(ones) == len(others) and all(equal(a, b) and a.bad == b.bad for a, b in zip(ones, others, strict=True))


def test_workers_change_nothing(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "CHUNK", 3)
    alone = list(BankLoader(dataset_of(bank)).batches(2, 8))
    assert [len(batch) for batch in alone] == [8] * 6
    assert same(list(BankLoader(dataset_of(bank), workers=2).batches(2, 8)), alone)


def test_chunks_change_nothing(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(BankLoader(dataset_of(bank)).batches(0, 3))
    monkeypatch.setattr(loader_module, "CHUNK", 5)
    assert same(list(BankLoader(dataset_of(bank)).batches(0, 3)), whole)


@pytest.mark.slow
def test_a_spawned_worker_reads_the_same(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(BankLoader(dataset_of(bank)).batches(0, 2))
    context = torch.multiprocessing.get_context("spawn")
    original = loader_module.DataLoader

    def spawning(*args: object, **options: object) -> object:
        return original(*args, multiprocessing_context=context, **options)

    monkeypatch.setattr(loader_module, "DataLoader", spawning)
    assert same(list(BankLoader(dataset_of(bank), workers=1).batches(0, 2)), alone)


def test_chunks_change_nothing_with_several_captions_a_image(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=8, captions_per_image=3)
    whole = list(BankLoader(dataset).batches(0, 3))
    assert whole[0].rows.shape == (24,)
    monkeypatch.setattr(loader_module, "CHUNK", 3)
    assert same(list(BankLoader(dataset).batches(0, 3)), whole)


def test_starting_anywhere_goes_on_exactly(bank: Bank) -> None:
    unbroken = list(BankLoader(dataset_of(bank)).batches(0, 12))  # two epochs and a part
    assert same(list(BankLoader(dataset_of(bank)).batches(7, 12)), unbroken[7:])
    assert same(list(islice(BankLoader(dataset_of(bank)).batches(7), 5)), unbroken[7:])


def test_slices_of_all_processes_make_up_the_batch(bank: Bank) -> None:
    for_one = list(BankLoader(dataset_of(bank)).batches(0, 4))
    slices = [list(BankLoader(dataset_of(bank, 8, 2), process=i).batches(0, 4)) for i in range(2)]
    for whole, first, second in zip(for_one, *slices, strict=True):
        for value, *parts in zip(whole.tensors(), first.tensors(), second.tensors(), strict=True):
            assert torch.equal(torch.cat(parts), value)


def test_a_batch_that_was_let_go_is_gone_before_the_next_is_made(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a GPU holds a batch more than it needs, gigabytes of a large one."""
    loader = BankLoader(dataset_of(bank))
    made: list[weakref.ref[Batch]] = []
    alive: list[int] = []
    original = loader._host_batches

    def watched(start: int, stop: int | None) -> Iterator[Batch]:
        for number in range(3):
            alive.append(sum(ref() is not None for ref in made))
            made.append(weakref.ref(batch := next(original(number, number + 1))))
            yield batch
            del batch

    monkeypatch.setattr(loader, "_host_batches", watched)
    for batch in loader.batches(0, 3):
        del batch
    assert alive == [0, 0, 0]


def test_torchs_random_numbers_are_left_alone(bank: Bank) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(BankLoader(dataset_of(bank), workers=1).batches(0, 1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_by_cause(tmp_path: Path, workers: int) -> None:
    bank = damaged(tmp_path / "bank", tmp_path / "images", {4, 9})
    loader = BankLoader(dataset_of(bank, 10), workers=workers, max_bad_fraction=0.5)
    for batch in loader.batches(0, 3):
        assert len(batch) == 10
    assert loader.bad.counts["empty image"] >= 1 and loader.bad.counts["not an image"] >= 1
    assert loader.seen == 30 + loader.bad.num_bad


def test_too_many_bad_images_stop_the_run_at_its_end(tmp_path: Path) -> None:
    bank = damaged(tmp_path / "bank", tmp_path / "images", {4, 9})
    batches = BankLoader(dataset_of(bank, 10), max_bad_fraction=0.01).batches(0, 3)
    with pytest.raises(TooManyBadSamples, match=r"above max_bad_fraction 0\.01"):
        list(batches)


def test_counts_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    bank = damaged(tmp_path / "bank", tmp_path / "images", {4, 9, 11})
    whole, first, second = (BankLoader(dataset_of(bank, 10), max_bad_fraction=1.0) for _ in range(3))
    list(whole.batches(0, 6))
    list(first.batches(0, 4))
    second.restore(first.state())
    list(second.batches(4, 6))
    assert second.state() == whole.state()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_arrives_as_it_is(tmp_path: Path, workers: int) -> None:
    bank = damaged(tmp_path / "bank", tmp_path / "images", set(range(30)))
    with pytest.raises(SourceError, match=r"tried for one place cannot be used") as caught:
        list(BankLoader(dataset_of(bank, 10), workers=workers).batches(0, 1))
    assert "\n" not in str(caught.value)


class DyingDataset(BankDataset):
    """Its worker is killed, as for want of memory."""

    def __getitem__(self, part: tuple[int, int, int]) -> Batch | LLM2CLIPError:
        if part[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(part)


@pytest.mark.ci
def test_a_killed_worker_is_one_clear_line(bank: Bank) -> None:
    dying = DyingDataset([bank], transform=TRANSFORM, batch_size=8)
    with pytest.raises(LLM2CLIPError, match=r"a process that reads images died.*fewer workers") as caught:
        list(BankLoader(dying, workers=1).batches(0, 4))
    assert "\n" not in str(caught.value)
