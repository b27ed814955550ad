"""What a tile knows of its pairs, by hand: two images of one caption each on this process, four captions on all."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2clip.student.loss_tiles import Targets

ROWS = torch.tensor([10, 11, 12, 10])
"""Of all captions; the first two are this process's."""
WHOLE = slice(0, 2), slice(0, 4)


def table(values: Tensor | None) -> list[list[int]]:
    assert values is not None
    return values.int().tolist()


def test_a_caption_is_left_out_for_its_row() -> None:
    cut = Targets(captions_each=1, first=0, device=torch.device("cpu"), own_rows=ROWS[:2], all_rows=ROWS).tile(*WHOLE)
    assert table(cut.positive) == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert table(cut.ignored) == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_a_tile_without_an_images_own_caption_has_none() -> None:
    second = Targets(captions_each=2, first=1, device=torch.device("cpu"))  # images 1 and 2 own captions 2 to 5
    assert table(second.tile(slice(0, 2), slice(2, 7)).positive) == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert second.tile(slice(0, 2), slice(0, 2)).positive is None
    assert second.tile(slice(0, 1), slice(4, 6)).positive is None
    assert table(second.tile(slice(1, 2), slice(5, 6)).positive) == [[1]]
