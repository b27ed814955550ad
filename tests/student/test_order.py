"""The order is a permutation, fair, the same from any step on, and mixes banks as told."""

from __future__ import annotations

import numpy as np
import pytest

from llm2clip.student.order import SMALL, Mixture, ShuffledOrder, apportion, hashed, key_of, permuted, uniforms


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, SMALL, SMALL + 1, 10007, 2**14])
def test_every_number_comes_once(size: int) -> None:
    for key in (0, key_of("a"), 2**64 - 1):
        assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


def test_a_part_of_a_permutation_needs_not_the_rest() -> None:
    for size in (100, 60_000_000):
        whole = permuted(np.arange(80), size, 5)
        assert np.array_equal(permuted(np.arange(30, 50), size, 5), whole[30:50])
        assert whole.max() < size and len(set(whole.tolist())) == 80


@pytest.mark.parametrize("size", [6, SMALL + 904])
def test_every_place_gets_every_number_alike(size: int) -> None:
    counts = np.zeros((10, 10))
    for key in range(1000):
        place = permuted(np.arange(0, size, max(1, size // 10))[:10], size, key_of("fair", key))
        counts[np.arange(len(place)), place * 10 // size] += 1
    used = counts[:, counts.any(0)][counts.any(1)]
    expected = used.sum() / used.size
    chi_square = ((used - expected) ** 2 / expected).sum()
    freedom = used.size - len(used)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # 5 standard deviations


def test_neighbours_and_keys_are_unrelated() -> None:
    size = 50_000
    one, other = (permuted(np.arange(size), size, key) for key in (1, 2))
    for a, b in ((one[:-1], one[1:]), (one, other), (one, np.arange(size))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(size)


def test_uniform_numbers() -> None:
    draws = uniforms(np.arange(5000), 8, key_of("draws"))
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=5 / np.sqrt(12 * 5000))
    assert np.abs(np.corrcoef(draws.T) - np.eye(8)).max() < 5 / np.sqrt(5000)
    assert np.array_equal(uniforms(np.array([4321]), 8, key_of("draws"))[0], draws[4321])


def drawn(mixture: Mixture, batches: range) -> tuple[np.ndarray, np.ndarray]:
    """Banks and samples of whole batches."""
    places = np.arange(mixture.batch_size)
    parts = [mixture.draw(batch, places) for batch in batches]
    return np.stack([part[0] for part in parts]), np.stack([part[1] for part in parts])


def test_an_epoch_holds_no_sample_twice_and_drops_another_rest_each_time() -> None:
    mixture = Mixture([ShuffledOrder(50, seed=3)], batch_size=8, seed=3)
    assert mixture.batches_per_epoch == 6
    epochs = [drawn(mixture, range(first, first + 6))[1].ravel() for first in (0, 6, 12)]
    assert all(len(set(samples.tolist())) == 48 for samples in epochs)
    assert len({tuple(samples.tolist()) for samples in epochs}) == 3
    assert len({frozenset(range(50)) - set(samples.tolist()) for samples in epochs}) > 1


def test_another_seed_is_another_order() -> None:
    first, other = (drawn(Mixture([ShuffledOrder(50, seed=s)], batch_size=8, seed=s), range(6))[1] for s in (0, 1))
    assert not np.array_equal(first, other)


def test_banks_by_size_are_gone_through_once_an_epoch() -> None:
    mixture = Mixture([ShuffledOrder(30, seed=0, name="0"), ShuffledOrder(10, seed=0, name="1")], batch_size=8, seed=0)
    assert mixture.batches_per_epoch == 5
    for first in (0, 5):
        banks, samples = drawn(mixture, range(first, first + 5))
        seen = set(zip(banks.ravel().tolist(), samples.ravel().tolist(), strict=True))
        assert seen == {(0, i) for i in range(30)} | {(1, i) for i in range(10)}


def test_banks_by_weight_are_drawn_at_their_rates_and_each_evenly() -> None:
    orders = [ShuffledOrder(900, seed=0, name="0"), ShuffledOrder(100, seed=0, name="1")]
    mixture = Mixture(orders, weights=[0.5, 0.5], batch_size=50, seed=0)
    banks, samples = drawn(mixture, range(40))  # two epochs: 1000 draws of each bank
    assert (banks == 1).sum() == 1000
    assert set(np.bincount(samples[banks == 1]).tolist()) == {10}
    assert set(np.bincount(samples[banks == 0], minlength=900).tolist()) == {1, 2}
    assert (banks == 1).sum(1).min() > 10 and (banks == 1).sum(1).max() < 40


def test_short_epochs_keep_the_rates_within_a_short_stretch() -> None:
    orders = [ShuffledOrder(900, seed=0, name="0"), ShuffledOrder(100, seed=0, name="1")]
    mixture = Mixture(orders, batch_size=20, seed=0, epoch=40)
    banks, samples = drawn(mixture, range(50))
    assert (banks.reshape(25, 40).sum(1) == 4).all()
    assert len(set(zip(banks.ravel().tolist(), samples.ravel().tolist(), strict=True))) == 1000


def test_apportion_by_hand() -> None:
    assert apportion(3, [1, 1]) == [2, 1]
    assert apportion(100, [0.7, 0.2, 0.1]) == [70, 20, 10]
    assert apportion(10, [0.14, 0.27, 0.59]) == [1, 3, 6]  # 1.4, 2.7, 5.9: the largest remainders go up


def test_the_order_of_a_bank_depends_on_seed_name_and_epoch() -> None:
    orders = [ShuffledOrder(50, seed=seed, name=name) for seed, name in ((0, "0"), (0, "1"), (1, "0"))]
    epochs = [order.samples(np.arange(first, first + 50)) for order in orders for first in (0, 50)]
    assert len({tuple(samples.tolist()) for samples in epochs}) == 6


def test_banks_are_interleaved_otherwise_by_seed_number_and_epoch() -> None:
    def patterns(seed: int, number: int) -> list[tuple[int, ...]]:
        orders = [ShuffledOrder(64, seed=0, name="0"), ShuffledOrder(64, seed=0, name="1")]
        mixture = Mixture(orders, batch_size=16, seed=seed, epoch=16, number=number)  # a batch is an epoch
        banks, _ = drawn(mixture, range(4))
        assert (banks.sum(1) == 8).all()
        return [tuple(row) for row in banks.tolist()]

    found = [pattern for seed in (0, 1) for number in (0, 1) for pattern in patterns(seed, number)]
    assert len(set(found)) == 16


def test_bits_are_those_of_splitmix64() -> None:
    """The generator of Steele, Lea and Flood in whole numbers; its finaliser twice, on value xor key."""

    def splitmix(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    assert splitmix(0) == 0xE220A8397B1DCDAF  # the first number of the published generator with seed 0
    values = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    for key in (0, 12345678901234567890):
        assert hashed(values, key).tolist() == [splitmix(splitmix(int(value) ^ key)) for value in values]
