"""Retrieval on a benchmark: what one pass tells, by length of the captions too."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llm2clip.data.sample import ImageRef, Sample
from llm2clip.eval import retrieval
from llm2clip.eval.retrieval import NamedRetrieval, token_counter

VECTORS = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 1.0]}


class Given:
    """An encoder of three images and of texts by their first letter."""

    def images(self, samples: Sequence[Sample]) -> tuple[list[int], torch.Tensor]:
        return list(range(len(samples))), torch.eye(3)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([VECTORS[text[0]] for text in texts])


def samples(*captions: Sequence[str]) -> list[Sample]:
    return [Sample(str(i), ImageRef(str(i)), {"": tuple(own)}) for i, own in enumerate(captions)]


def test_scores_worked_out_by_hand() -> None:
    """Image 0 has "a" and "b", image 1 "b", image 2 "a": their lists are tied where two captions are the same."""
    evaluator = NamedRetrieval(samples(["a", "b"], ["b!"], ["a!"]))
    found = {score.name: score.value for score in evaluator.run(Given())}
    assert found["i2t_r@1"] == 0  # each first place is shared with a wrong one, which counts against the model
    assert found["i2t_r@5"] == 1
    assert found["t2i_r@1"] == pytest.approx(2 / 4)
    # image 0: "a" second, "b" (cosine 0, tied with "b!") last; image 1: second; image 2: tied at 0 with all, last
    assert found["i2t_map@10"] == pytest.approx(((1 / 2 + 2 / 4) / 2 + 1 / 2 + 1 / 4) / 3)
    log = np.log2
    first = (1 / log(3) + 1 / log(5)) / (1 + 1 / log(3))
    assert found["i2t_ndcg@10"] == pytest.approx((first + 1 / log(3) + 1 / log(5)) / 3)
    # ranks of the images: "a" 1; "b" 3, as 0 and 2 are tied behind 1; "b!" 1; "a!" 3
    assert evaluator.median_ranks == {"i2t": 2.0, "t2i": 2.0}


def test_shares_add_up_to_the_value() -> None:
    for score in NamedRetrieval(samples(["a", "b"], ["b!"], ["c"])).run(Given()):
        sums, counts = score.shares
        assert score.value == pytest.approx(sums.sum() / counts.sum()) and len(sums) == score.num_images == 3


def test_short_and_long_captions_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chart's bars are of all captions of a length, and none are of one length alone, or of a language."""
    monkeypatch.setattr(retrieval, "token_counter", lambda: lambda text: 2 + len(text.split()))
    evaluator = NamedRetrieval(samples(["a" + " word" * 18, "b" + " word" * 19], ["b" + " x" * 38], ["c" + " x" * 398]))
    list(evaluator.run(Given()))
    bars = [tuple(bar.values()) for bar in evaluator.by_length]
    assert bars == [("21 to 40", 2, 0.5), ("41 to 77", 1, 1.0), ("over 300", 1, 1.0)]
    spoken = [Sample(s.id, s.image, {"en": s.captions[""]}) for s in evaluator.samples]
    of_a_language = NamedRetrieval(spoken)
    assert any("tokens" in score.name for score in of_a_language.run(Given())) and not of_a_language.by_length
    long, cut = "a" + " word" * 75, "c" + " word" * 74
    found = {score.name: score.value for score in NamedRetrieval(samples([long], ["b"], [cut, "a"])).run(Given())}
    assert found["over-77-tokens/t2i_r@1"] == 1
    assert found["up-to-77-tokens/t2i_r@1"] == pytest.approx(2 / 3)
    found = {score.name: score.value for score in NamedRetrieval(samples([long], [long], [long])).run(Given())}
    assert not any("tokens" in name for name in found), "all of one length: there is nothing to compare"


@pytest.mark.ci
def test_tokens_are_those_of_the_first_clips() -> None:
    pytest.importorskip("open_clip", reason="pip install 'llm2clip[metrics]'")
    count = token_counter()
    assert count is not None and count("a photo of a cat") == 7 and count("a" * 200) > 3


def test_without_open_clip_there_are_no_scores_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    token_counter.cache_clear()
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    assert token_counter() is None
    token_counter.cache_clear()
