"""The mixture: which texts pair, and in which order, as a pure function of the seed."""

from __future__ import annotations

from collections import Counter

import pytest

from llm2clip.errors import UsageError
from llm2clip.teacher.mixture import (
    BatchOrder,
    Mixture,
    Task,
    check_sizes,
    count_steps,
    parse_kinds,
    task_weights,
    text_key,
)

IMAGES = [{"kinds": ["short", "long", "long"], "texts": [f"s{i}", f"l{i}", f"m{i}"]} for i in range(12)]
TRIPLETS = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}" if i % 2 else None} for i in range(8)]


def order(**changes: object) -> BatchOrder:
    return BatchOrder(**{"sizes": [12, 8], "batch_size": 4, "steps": 10, "seed": 0, **changes})


def test_each_batch_is_of_one_task_and_a_pass_sees_every_row_once():
    batches = list(order(steps=5))
    assert [len({key[0] for key in batch}) for batch in batches] == [1] * 5
    seen = Counter(key for batch in batches for key in batch)
    assert set(seen.values()) == {1}
    assert {key[2] for key in seen if key[0] == 0} == set(range(12))
    assert {key[2] for key in seen if key[0] == 1} == set(range(8))
    assert len({batch[0][0] for batch in batches[:4]}) == 2  # the tasks are mixed, not one after the other


def test_order_is_a_function_of_the_seed_and_new_in_each_pass():
    assert list(order()) == list(order())
    assert list(order()) != list(order(seed=1))
    passes = [[key[2] for batch in list(order())[i : i + 5] for key in batch if key[0] == 0] for i in (0, 5)]
    assert sorted(passes[0]) == sorted(passes[1]) and passes[0] != passes[1]
    longer = list(order(steps=20))
    assert longer[:10] == list(order())


def test_processes_share_the_same_batches():
    whole, parts = list(order()), list(order(num_parts=2))
    assert len(parts) == 20 == len(order(num_parts=2))
    assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == whole


def test_weights_set_how_often_a_task_comes():
    counts = Counter(batch[0][0] for batch in order(steps=1000, weights=[0.25, 0.75]))
    assert 200 < counts[0] < 300
    by_size = Counter(batch[0][0] for batch in order(steps=1000))
    assert by_size == {0: 600, 1: 400}


def test_a_pair_is_two_captions_of_one_image_and_changes_by_pass():
    task = Task(name="captions", rows=IMAGES, negatives=True)
    rows = [task.draw(5, seed=0, epoch=epoch) for epoch in range(20)]
    assert all({row["query"][1:], row["positive"][1:]} == {"5"} and row["query"] != row["positive"] for row in rows)
    assert len({(row["query"], row["positive"]) for row in rows}) > 3
    assert rows[0] == task.draw(5, seed=0, epoch=0)
    for row in rows:
        assert row["negative"][1:] != "5"
        assert row["label"] == [
            *(text_key(row[name]) for name in ("query", "positive", "negative")),
            5,
            5,
            int(row["negative"][1:]),
        ]


def test_pair_weights_choose_the_kinds():
    task = Task(name="captions", rows=IMAGES, negatives=False, kinds=parse_kinds({"long+short": 1.0}))
    rows = [task.draw(3, seed=0, epoch=epoch) for epoch in range(20)]
    assert all("s3" in (row["query"], row["positive"]) and "negative" not in row for row in rows)
    assert {row["query"] for row in rows} == {"s3", "l3", "m3"}  # which of the two is the query is random


def test_the_same_caption_twice():
    task = Task(name="captions", rows=IMAGES, negatives=False, same=True)
    rows = [task.draw(0, seed=0, epoch=epoch) for epoch in range(20)]
    assert all(row["query"] == row["positive"] and "negative" not in row for row in rows)
    assert {row["query"] for row in rows} == {"s0", "l0", "m0"}  # another caption in each pass
    assert [task.draw(0, seed=1, epoch=epoch) for epoch in range(20)] != rows


def test_given_negatives_are_used_and_others_drawn():
    task = Task(name="nli", rows=TRIPLETS)
    assert task.draw(1, seed=0, epoch=0)["negative"] == "n1"
    assert task.draw(1, seed=0, epoch=0)["label"][3:] == [1, 1, -1]
    drawn = {task.draw(0, seed=0, epoch=epoch)["negative"] for epoch in range(30)}
    assert "p0" not in drawn and len(drawn) > 3 and all(text[0] == "p" for text in drawn)


def test_negatives_are_drawn_from_all_other_rows_and_from_the_seed():
    task = Task(name="captions", rows=IMAGES)
    for index in (0, 5, 11):
        drawn = [task.draw(index, seed=0, epoch=epoch)["label"][5] for epoch in range(200)]
        assert set(drawn) == set(range(12)) - {index}
    labels = [[task.draw(5, seed=seed, epoch=epoch)["label"][5] for epoch in range(20)] for seed in (0, 1)]
    assert labels[0] != labels[1]


def test_tasks_of_one_size_have_orders_of_their_own():
    keys = [key for batch in order(sizes=[12, 12], steps=6) for key in batch]
    rows = [[key[2] for key in keys if key[0] == task] for task in (0, 1)]
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]


def test_rows_carry_their_tasks_name():
    mixture = Mixture([Task(name="captions", rows=IMAGES), Task(name="nli", rows=TRIPLETS)], seed=0)
    assert mixture[1, 0, 3]["dataset_name"] == "nli"
    assert list(mixture[0, 0, 3]) == ["dataset_name", "query", "positive", "negative", "label"]


def test_near_equal_texts_have_one_key():
    assert text_key("A red disc.") == text_key("a  RED disc!") != text_key("a red disk")
    assert text_key("一只红色的猫。") == text_key("一只红色的猫") != text_key("一只蓝色的猫")
    assert text_key("ｒｅｄ ﬁsh") == text_key("red fish")  # the same letters, written in other code points
    assert text_key("🙂") != text_key("🐈") and text_key("قطة حمراء") != text_key("قطة زرقاء")


def test_steps_of_a_pass():
    assert count_steps([12, 8], batch_size=4, epochs=2) == 10
    assert count_steps([12, 8], batch_size=5, epochs=1) == 3
    assert count_steps([12], batch_size=4, epochs=0.01) == 1


def test_wrong_weights_and_sizes_are_named():
    tasks = [Task(name="captions", rows=IMAGES), Task(name="nli", rows=TRIPLETS)]
    names = [task.name for task in tasks]
    assert task_weights(names, {"nli": 1.0, "captions": 3.0}) == [3.0, 1.0]
    with pytest.raises(UsageError, match="no such task; there are captions, nli"):
        task_weights(names, {"snli": 1.0})
    for wrong in (
        {"captions": 1.0},
        {"captions": float("nan"), "nli": 1.0},
        {"captions": float("inf"), "nli": 1.0},
        {"captions": -1.0, "nli": 1.0},
        {"captions": 0.0, "nli": 0.0},
    ):
        with pytest.raises(UsageError, match="give each task a weight"):
            task_weights(names, wrong)
    with pytest.raises(UsageError, match=r"nli has 8 usable rows.*give batch_size=8 or less"):
        check_sizes(tasks, batch_size=10)
    for wrong in ("short", "short+", "short+long+raw"):
        with pytest.raises(UsageError, match="two kinds"):
            parse_kinds({wrong: 1.0})
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="two kinds and a weight"):
            parse_kinds({"short+long": weight})
