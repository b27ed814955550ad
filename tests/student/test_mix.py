"""Which caption is taken of a sample."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import UsageError
from llm2clip.student.mix import (
    check_banks,
    check_batch_size,
    choose_captions,
    default_batch_size,
    kind_weights,
    open_order,
    wanted_kinds,
)
from llm2clip.student.order import Mixture, ShuffledOrder

from .banks import write_test_bank

KINDS = [0, 1, 1, 2]


def test_by_hand() -> None:
    weights = [0.25, 0.5, 0.25]
    assert choose_captions(KINDS, weights, [0.0, 0.9]) == [0]
    assert choose_captions(KINDS, weights, [0.26, 0.49]) == [1]
    assert choose_captions(KINDS, weights, [0.74, 0.5]) == [2]
    assert choose_captions(KINDS, weights, [0.76, 0.5]) == [3]


def test_weights_count_among_the_kinds_that_are_there() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(choose_captions([0, 2, 2], [1, 5, 3], rng.random(2).tolist())[0] for _ in range(4000))
    assert drawn[0] / 4000 == pytest.approx(0.25, abs=0.03)
    assert drawn[1] / 4000 == pytest.approx(0.375, abs=0.03)


def test_a_kind_without_weight_is_never_taken() -> None:
    assert choose_captions([1, 1], [1, 0], [0.5, 0.5]) == []
    assert {choose_captions(KINDS, [0, 0, 1], [draw, draw])[0] for draw in (0.0, 0.5, 0.999)} == {3}


def test_none_twice_before_all_were_taken() -> None:
    draws = np.random.default_rng(0).random((200, 12)).tolist()
    for chosen in (choose_captions(KINDS, [1, 1, 1], row) for row in draws):
        assert sorted(chosen[:4]) == [0, 1, 2, 3] and len(set(chosen[4:])) == 2


def bank_of(folder: Path, *kinds: str, teacher: str = "t" * 16):
    """A bank of one sample with a caption of each kind."""
    sample = Sample("x", ImageRef("x.jpg"), {kind: (f"a {kind} caption",) for kind in kinds})
    return write_test_bank(folder, [sample], teacher=teacher)


def test_weights_are_in_the_order_of_each_banks_kinds(tmp_path: Path) -> None:
    banks = [bank_of(tmp_path / "a", "short", "long"), bank_of(tmp_path / "b", "zh", "short")]
    mix = {"short": 3.0, "long": 1.0, "raw": 0.0}
    assert [kind_weights(bank, mix) for bank in banks] == [[3.0, 1.0], [0.0, 3.0]]
    assert [kind_weights(bank, {}) for bank in banks] == [[1.0, 1.0], [1.0, 1.0]]
    assert wanted_kinds(banks, {}) == ["long", "short", "zh"]
    assert wanted_kinds(banks, {"zh": 1.0, "short": 1.0}) == ["zh", "short"]
    with pytest.raises(UsageError, match="'raw' is unknown"):
        wanted_kinds(banks, {"short": 1.0, "raw": 1.0})


def test_a_kind_of_weight_0_is_not_wanted(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "a", "short", "long")
    assert wanted_kinds([bank], {"short": 1.0, "long": 0.0}) == ["short"]
    with pytest.raises(UsageError, match="has captions of zh, but mix wants short"):
        wanted_kinds([bank, bank_of(tmp_path / "b", "zh")], {"short": 1.0, "zh": 0.0})


def test_every_bank_is_checked(tmp_path: Path) -> None:
    good, foreign = bank_of(tmp_path / "a", "raw"), bank_of(tmp_path / "b", "raw", teacher="u" * 16)
    for banks in ([good, foreign], [good, good, foreign], [good, foreign, good]):
        with pytest.raises(UsageError, match=f"^bank {foreign.folder} is of teacher u"):
            check_banks(banks)
    foreign.num_samples = 0
    with pytest.raises(UsageError, match=f"^bank {foreign.folder} holds no samples"):
        check_banks([good, foreign])


def test_the_batch_that_fits() -> None:
    check_batch_size(8, 4, num_samples=8)
    for batch_size, processes, fit in ((10, 4, 8), (3, 4, 4)):
        with pytest.raises(UsageError, match=f"take {fit}"):
            check_batch_size(batch_size, processes, num_samples=100)


def test_the_batch_by_default() -> None:
    assert [default_batch_size(4096, n) for n in (1, 3, 8)] == [4096, 4095, 4096]
    assert [default_batch_size(10**7, 1), default_batch_size(300, 1), default_batch_size(300, 8)] == [4096, 300, 296]


def test_rounding_at_the_end_of_the_weights_takes_the_last() -> None:
    """Of these four, what is drawn just below 1 is more than their sum, taken one by one."""
    weights, last = [0.1, 0.3, 0.15, 0.3], float(np.nextafter(1, 0))
    left = last * sum(weights)
    for weight in weights:
        left -= weight
    assert left > 0
    assert choose_captions([0, 1, 2, 3], weights, [last, 0.0]) == [3]


def test_the_order_of_banks_is_handed_what_decides_it(tmp_path: Path) -> None:
    samples = [Sample(str(i), ImageRef(f"{i}"), {"short": (str(i),)}) for i in range(9)]
    banks = [write_test_bank(tmp_path / str(size), samples[:size]) for size in (9, 6)]
    places = np.arange(5)
    for weights in (None, [1.0, 2.0]):
        order, _ = open_order(banks, weights=weights, batch_size=5, seed=3, num_processes=1)
        orders = [ShuffledOrder(9, seed=3, name="0"), ShuffledOrder(6, seed=3, name="1")]
        wanted = Mixture(orders, weights=weights, batch_size=5, seed=3)
        for batch in range(6):
            for ours, theirs in zip(order.draw(batch, places), wanted.draw(batch, places), strict=True):
                assert ours.tolist() == theirs.tolist()


def test_draws_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        choose_captions([0, 1], [1.0, 1.0], [0.1, 0.2, 0.3])
