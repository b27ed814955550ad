"""Cards of benchmarks, and the table of published scores with its averages."""

from __future__ import annotations

from llm2clip.eval import benchmarks
from llm2clip.eval.card import described, numbers, published_table
from llm2clip.eval.named import card_of
from llm2clip.parts import part_names

FIVE = ("flickr30k", "coco-karpathy", "sharegpt4v-1k", "urban1k", "docci")
"""The sets of the paper's table 1, whose average it prints."""


def wrong_averages() -> dict[str, tuple[list[float], list[float]]]:
    """The models whose printed average of the five sets is not the mean of their row: what is printed, and the mean."""
    wrong = {}
    for row in published_table():
        if not row["average"]:
            continue
        printed = [value for value in numbers(row["average"]) if value is not None]
        cells = [numbers(row[name]) for name in FIVE]
        means = [sum(cell[way] or 0 for cell in cells) / len(FIVE) for way in (0, 1)]
        if any(abs(a - b) > 0.1 for a, b in zip(printed, means, strict=True)):  # more than rounding or cutting off
            wrong[row["model"]] = printed, [round(mean, 1) for mean in means]
    return wrong


def test_three_averages_of_the_paper_are_wrong() -> None:
    assert wrong_averages() == {
        "CLIP ViT-L/14 + LLM2CLIP-60M 336": ([91.1, 84.5], [89.5, 85.5]),
        "EVA02 ViT-L/14 + LLM2CLIP-15M 336": ([88.0, 84.8], [89.2, 86.1]),
        "EVA02 ViT-L/14 + LLM2CLIP-60M 336": ([91.0, 86.8], [90.7, 86.7]),
    }
    assert sum(bool(row["average"]) for row in published_table()) == 32


def test_the_columns_of_the_table_are_benchmarks() -> None:
    columns = set(published_table()[0]) - {"source", "model", "average"}
    assert set(FIVE) <= columns
    assert columns <= set(part_names(benchmarks))


def test_a_card_says_what_is_not_known() -> None:
    import dataclasses

    card = dataclasses.replace(card_of("urban1k"), images=None)
    assert "  images    not known: what is found is counted, not checked" in list(described("urban1k", card))
