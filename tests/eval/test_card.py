"""Cards of benchmarks, and the table of published scores with its averages."""

from __future__ import annotations

from llm2clip.eval import benchmarks
from llm2clip.eval.card import FIVE, described, published_table, wrong_averages
from llm2clip.eval.named import card_of
from llm2clip.parts import part_names


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
