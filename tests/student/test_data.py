"""Batches are a pure function of seed and number, hold what they say, and survive bad samples."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.bank.reader import Bank
from llm2clip.data.images import load_image
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import SourceError, UsageError
from llm2clip.student import data as data_module
from llm2clip.student import mix as mix_module
from llm2clip.student.data import BankDataset, Batch
from llm2clip.student.transform import ImageTransform

from .banks import colour, image_samples, vector_of, write_test_bank

TRANSFORM = ImageTransform(image_size=(16, 16), resize=16)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("data")
    return write_test_bank(folder / "bank", image_samples(folder / "images", 48))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("other")
    return write_test_bank(folder / "bank", image_samples(folder / "images", 12, name="q"))


def load(dataset: BankDataset, number: int, first: int = 0, last: int | None = None) -> Batch:
    batch = dataset[number, first, dataset.batch_size if last is None else last]
    assert isinstance(batch, Batch)
    return batch


def equal(one: Batch, another: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), another.tensors(), strict=True))


def test_a_batch_holds_images_and_vectors_of_their_captions(bank: Bank) -> None:
    batch = load(BankDataset([bank], transform=TRANSFORM, batch_size=8), 0)
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (8, 3, 16, 16)
    assert batch.text_embeds.dtype == torch.float16 and len(batch) == 8 and batch.bad == []
    for pixels, vector, row, sample in zip(batch.pixels, *batch.tensors()[1:], strict=True):
        assert row in bank.rows(int(sample)).tolist()
        assert tuple(pixels[:, 3, 3].tolist()) == colour(int(sample))
        np.testing.assert_array_equal(vector.numpy(), vector_of(bank.text(int(row))))


def test_parts_make_up_the_batch_and_numbers_need_no_replay(bank: Bank) -> None:
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=8, seed=5)
    whole = load(dataset, 7)
    parts = [load(dataset, 7, first, last) for first, last in ((0, 3), (3, 4), (4, 8))]
    for name in ("pixels", "text_embeds", "rows", "samples"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert equal(load(pickle.loads(pickle.dumps(dataset)), 7), whole)
    assert not equal(load(BankDataset([bank], transform=TRANSFORM, batch_size=8, seed=6), 7), whole)


def test_no_memory_map_travels_to_a_worker(bank: Bank) -> None:
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=8)
    load(dataset, 0)
    assert len(pickle.dumps(dataset)) < 5000


def test_crops_and_captions_change_from_epoch_to_epoch(tmp_path: Path) -> None:
    images = image_samples(tmp_path / "images", 3)
    gradient = np.linspace(0, 255, 80 * 60 * 3).reshape(80, 60, 3).astype(np.uint8)
    Image.fromarray(gradient).save(images[0].image.path)
    one = write_test_bank(tmp_path / "bank", [Sample("x", images[0].image, {"a": ("1", "2", "3")})])
    dataset = BankDataset([one], transform=TRANSFORM, batch_size=1)
    batches = [load(dataset, epoch) for epoch in range(30)]
    assert {int(batch.rows) for batch in batches} == {0, 1, 2}
    assert len({batch.packed.numpy().tobytes() for batch in batches}) > 10


def test_without_random_crops_pixels_are_the_towers_own(bank: Bank) -> None:
    batch = load(BankDataset([bank], transform=TRANSFORM, batch_size=8, min_crop=1.0), 3)
    for pixels, sample in zip(batch.pixels, batch.samples.tolist(), strict=True):
        assert torch.equal(pixels, TRANSFORM(load_image(bank.image(sample))))


def test_kinds_are_drawn_by_weight_among_those_a_sample_has(bank: Bank) -> None:
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=48, mix={"short": 3, "long": 1})
    drawn: Counter[str] = Counter()
    for number in range(20):
        batch = load(dataset, number)
        for row, sample in zip(batch.rows.tolist(), batch.samples.tolist(), strict=True):
            captions = bank.sample(sample).captions
            if "long" in captions:
                drawn[next(kind for kind, texts in captions.items() if bank.text(row) in texts)] += 1
            elif "long" not in captions:
                assert bank.text(row) in captions["short"]
    assert set(drawn) == {"short", "long"}
    assert drawn["long"] / drawn.total() == pytest.approx(0.25, abs=0.07)  # 4 standard errors of 640 draws


def test_several_captions_a_image_are_different_ones(bank: Bank) -> None:
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=48, captions_per_image=2)
    batch = load(dataset, 3)
    assert batch.text_embeds.shape == (96, 8) and batch.rows.shape == (96,) and len(batch) == 48
    for sample, pair, vectors in zip(
        batch.samples.tolist(), batch.rows.view(48, 2).tolist(), batch.text_embeds.view(48, 2, -1).numpy(), strict=True
    ):
        there = bank.rows(sample).tolist()
        assert set(pair) <= set(there) and len(set(pair)) == min(2, len(there))
        np.testing.assert_array_equal(vectors, [vector_of(bank.text(row)) for row in pair])
    assert torch.equal(load(BankDataset([bank], transform=TRANSFORM, batch_size=48), 3).pixels, batch.pixels)


def test_a_sample_without_a_wanted_kind_is_replaced_and_counted(bank: Bank) -> None:
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=24, mix={"zh": 1})
    batch = load(dataset, 0)
    assert all("中文" in bank.text(row) for row in batch.rows.tolist())
    assert {cause for _, cause, _ in batch.bad} == {"no wanted caption"} and batch.bad[0][2].endswith("zh")


def damaged(bank_folder: Path, images: Path, missing: set[int]) -> Bank:
    samples = image_samples(images, 30)
    for i in missing:
        Path(samples[i].image.path).write_bytes(b"" if i % 2 else b"no image")
    return write_test_bank(bank_folder, samples)


def test_bad_images_are_replaced_the_same_way_each_time(tmp_path: Path) -> None:
    bank = damaged(tmp_path / "bank", tmp_path / "images", {3, 8, 20})
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=30)
    batch = load(dataset, 0)
    assert len(batch) == 30 and {3, 8, 20}.isdisjoint(batch.samples.tolist())
    assert {sample_id for sample_id, _, _ in batch.bad} >= {"p3", "p8", "p20"}
    assert {cause for _, cause, _ in batch.bad} == {"empty image", "not an image"}
    assert all(
        tuple(p[:, 3, 3].tolist()) == colour(s) for p, s in zip(batch.pixels, batch.samples.tolist(), strict=True)
    )
    again = load(dataset, 0)
    assert equal(batch, again) and batch.bad == again.bad


def test_a_replacement_is_no_image_of_the_same_part(tmp_path: Path) -> None:
    bank = damaged(tmp_path / "bank", tmp_path / "images", {3, 8, 20})
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=10)
    for number in range(30):
        batch = load(dataset, number)
        assert len(set(batch.samples.tolist())) >= 9  # two bad ones may meet in one good sample


def test_nothing_but_bad_images_is_one_clear_line(bank: Bank, tmp_path: Path) -> None:
    samples = [replace(bank.sample(i), image=ImageRef(str(tmp_path / f"{i}.jpg"))) for i in range(20)]
    moved = write_test_bank(tmp_path / "bank", samples)
    error = BankDataset([moved], transform=TRANSFORM, batch_size=4)[0, 0, 4]
    assert isinstance(error, SourceError) and "missing file" in str(error) and "\n" not in str(error)


def test_several_banks_count_rows_and_samples_on(bank: Bank, other: Bank) -> None:
    dataset = BankDataset([bank, other], transform=TRANSFORM, batch_size=60)
    batch = load(dataset, 0)
    assert sorted(batch.samples.tolist()) == list(range(60)) and dataset.num_samples == 60
    for vector, row, sample in zip(batch.text_embeds, batch.rows.tolist(), batch.samples.tolist(), strict=True):
        of, shift, rows = (bank, 0, 0) if sample < 48 else (other, 48, bank.num_rows)
        assert row - rows in of.rows(sample - shift).tolist()
        np.testing.assert_array_equal(vector.numpy(), vector_of(of.text(row - rows)))


def test_a_bank_of_weight_0_is_left_out(bank: Bank, other: Bank) -> None:
    dataset = BankDataset([bank, other], transform=TRANSFORM, batch_size=12, bank_weights=(0, 1))
    assert dataset.num_samples == 12 and sorted(load(dataset, 0).samples.tolist()) == list(range(12))


def test_what_does_not_go_together_is_refused(bank: Bank, other: Bank, tmp_path: Path) -> None:
    foreign = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "p", 4), teacher="u" * 16)
    with pytest.raises(UsageError, match=r"uuuu.*tttt.*build both with one teacher"):
        BankDataset([bank, foreign], transform=TRANSFORM, batch_size=4)
    with pytest.raises(UsageError, match="batch_size 49 is above the 48 images"):
        BankDataset([bank], transform=TRANSFORM, batch_size=49)
    with pytest.raises(UsageError, match="does not divide among 3 processes; take 6"):
        BankDataset([bank], transform=TRANSFORM, batch_size=8, num_processes=3)
    with pytest.raises(UsageError, match="did you mean 'short'"):
        BankDataset([bank, other], transform=TRANSFORM, batch_size=8, mix={"shrot": 1})
    with pytest.raises(UsageError, match="no bank"):
        BankDataset([], transform=TRANSFORM, batch_size=8)


def test_a_bank_with_none_of_the_kinds_is_refused(bank: Bank, tmp_path: Path) -> None:
    samples = [Sample("x", bank.image(0), {"alt": ("a",)})]
    alone = write_test_bank(tmp_path / "bank", samples)
    with pytest.raises(UsageError, match="has captions of alt, but mix wants short"):
        BankDataset([bank, alone], transform=TRANSFORM, batch_size=8, mix={"short": 1})


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank of one image, dark at the left and bright at the right, with many captions."""
    folder = tmp_path_factory.mktemp("one")
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None], (256, 1, 3))).save(folder / "x.png")
    sample = Sample("x", ImageRef(str(folder / "x.png")), {"a": tuple(str(i) for i in range(200))})
    return write_test_bank(folder / "bank", [sample])


def test_crops_captions_and_replacements_depend_on_the_seed(one: Bank, bank: Bank) -> None:
    first, other = (BankDataset([one], transform=TRANSFORM, batch_size=1, seed=seed) for seed in (0, 1))
    for part in ("packed", "rows"):
        seen = [
            [getattr(load(dataset, number), part).numpy().tobytes() for number in range(8)]
            for dataset in (first, other)
        ]
        assert sum(a != b for a, b in zip(*seen, strict=True)) >= 6, part
    replaced = []
    for seed in (0, 1):
        dataset = BankDataset([bank], transform=TRANSFORM, batch_size=8, seed=seed)
        replaced.append(list(dataset._candidates(0, np.array([5]), 0, position=3)))
    assert replaced[0][0] == replaced[1][0] == 5 and replaced[0] != replaced[1]


def test_the_smallest_crop_is_the_one_asked_for(one: Bank) -> None:
    """Of an image as bright as its column, the spread of a crop's values says how wide it is."""
    widths = {}
    for min_crop in (0.9, 0.04):
        dataset = BankDataset([one], transform=TRANSFORM, batch_size=1, min_crop=min_crop)
        spread = [np.ptp(load(dataset, number).pixels[0, 0].numpy().astype(int)) for number in range(40)]
        widths[min_crop] = min(spread)
    assert widths[0.9] > 180 and widths[0.04] < 120


def test_images_are_decoded_no_larger_than_needed(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def noted(ref: ImageRef, *, min_size: int | None = None) -> Image.Image:
        sizes.append(min_size)
        return load_image(ref, min_size=min_size)

    monkeypatch.setattr(mix_module, "load_image", noted)
    for min_crop in (0.9, 1.0):
        load(BankDataset([bank], transform=TRANSFORM, batch_size=2, min_crop=min_crop), 0)
    assert sizes == [32, 32, 48, 48]


def test_banks_are_drawn_by_their_weights(bank: Bank, other: Bank) -> None:
    dataset = BankDataset([bank, other], transform=TRANSFORM, batch_size=60, bank_weights=(1, 3))
    batch = load(dataset, 0)
    assert (batch.samples < 48).sum() == 15
    assert dataset.batches_per_epoch == 1


def test_two_banks_of_equal_size_have_orders_of_their_own(bank: Bank, tmp_path: Path) -> None:
    twin = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "p", 48))
    drawn = load(BankDataset([bank, twin], transform=TRANSFORM, batch_size=96), 0).samples.tolist()
    of_bank, of_twin = ([n % 48 for n in drawn if (n < 48) == first] for first in (True, False))
    assert sorted(of_bank) == sorted(of_twin) and of_bank != of_twin


def test_the_order_within_and_between_banks_depends_on_the_seed(bank: Bank, other: Bank) -> None:
    drawn = []
    for seed in (0, 1):
        dataset = BankDataset([bank, other], transform=TRANSFORM, batch_size=60, seed=seed)
        drawn.append(load(dataset, 0).samples.tolist())
    assert [n < 48 for n in drawn[0]] != [n < 48 for n in drawn[1]], "which bank comes when"
    assert [n for n in drawn[0] if n < 48] != [n for n in drawn[1] if n < 48], "which of its samples"


def test_banks_of_two_dtypes_come_in_the_wider(bank: Bank, tmp_path: Path) -> None:
    exact = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "p", 6, name="e"), dtype="float32")
    for banks in ([bank, exact], [exact, bank]):
        assert load(BankDataset(banks, transform=TRANSFORM, batch_size=8), 0).text_embeds.dtype == torch.float32


@pytest.mark.parametrize("pixels", [1, 3 * 40 * 30, 10**9])
def test_how_many_images_are_decoded_together_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    """Nor which are replaced, by what, and in which order they are named."""
    bank = damaged(tmp_path / "bank", tmp_path / "images", {3, 8, 20, 21, 22})
    dataset = BankDataset([bank], transform=TRANSFORM, batch_size=12, captions_per_image=2)
    expected = [load(dataset, number) for number in range(6)]
    assert sum(len(batch.bad) for batch in expected) > 10
    monkeypatch.setattr(data_module, "GROUP_PIXELS", pixels)
    for number, batch in enumerate(expected):
        again = load(dataset, number)
        assert equal(again, batch) and again.bad == batch.bad


def test_no_more_images_are_decoded_together_than_told(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is 40 x 30."""
    dataset, steps = BankDataset([bank], transform=TRANSFORM, batch_size=8), []
    monkeypatch.setattr(data_module, "GROUP_PIXELS", 3 * 40 * 30)
    monkeypatch.setattr(dataset, "load_image", lambda ref, **_: steps.append("d") or load_image(ref))
    monkeypatch.setattr(dataset, "_write", lambda *_: steps.append("w"))
    load(dataset, 0)
    assert "".join(steps) == "dddwwwdddwwwddww"
