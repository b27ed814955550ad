"""What a tile knows of its pairs, by hand: two images of one caption each on this process, four captions on all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm2clip.student.loss_targets import Targets

TEACHER = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
"""Of all captions; the first two are this process's."""
ROWS = torch.tensor([10, 11, 12, 10])
WHOLE = slice(0, 2), slice(0, 4)


def targets(**given: Any) -> Targets:
    return Targets(captions_each=1, first=0, device=torch.device("cpu"), **given)


def table(values: Tensor | None) -> list[list[int]]:
    assert values is not None
    return values.int().tolist()


def test_captions_are_near_only_above_the_bound() -> None:
    near = targets(own_teacher=TEACHER[:2], all_teacher=TEACHER, ignore_above=0.0).tile(*WHOLE)
    assert table(near.positive) == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert table(near.ignored) == [[0, 0, 1, 0], [0, 0, 0, 1]]  # at right angles the cosine is the bound itself
    assert near.alike is None


def test_a_caption_is_left_out_for_its_row_or_for_its_teachers_vector() -> None:
    both = targets(
        own_rows=ROWS[:2],
        all_rows=ROWS,
        own_teacher=TEACHER[:2],
        all_teacher=TEACHER,
        ignore_above=0.5,
        temperature=0.5,
    ).tile(*WHOLE)
    assert table(both.ignored) == [[0, 0, 1, 1], [0, 0, 0, 1]]  # (0, 3) by its row alone, (0, 2) and (1, 3) as near
    assert both.alike is not None
    torch.testing.assert_close(both.alike[1], torch.tensor([-2.0, 0.0, -2.0, -torch.inf]).exp())
    positive = targets(own_rows=ROWS[:2], all_rows=ROWS, identical="positive").tile(*WHOLE)
    assert table(positive.positive) == [[1, 0, 0, 1], [0, 1, 0, 0]] and positive.ignored is None


def test_a_tile_without_an_images_own_caption_has_none() -> None:
    second = Targets(captions_each=2, first=1, device=torch.device("cpu"))  # images 1 and 2 own captions 2 to 5
    assert table(second.tile(slice(0, 2), slice(2, 7)).positive) == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert second.tile(slice(0, 2), slice(0, 2)).positive is None
    assert second.tile(slice(0, 1), slice(4, 6)).positive is None
    assert table(second.tile(slice(1, 2), slice(5, 6)).positive) == [[1]]
