"""Configs as plain data: pairs, names, checks, how often to save; by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from llm2clip import config
from llm2clip.errors import UsageError


def test_checkpoints_come_every_tenth_of_a_run_and_at_least_every_500_steps() -> None:
    cases = {(None, 10**6): 500, (None, 4999): 499, (None, 120): 12, (None, 3): 1, (7, 120): 7, (1000, 10**6): 1000}
    assert {case: config.save_interval(*case) for case in cases} == cases


@pytest.mark.parametrize("word", ["short", "short=", "=caption", "=", ""])
def test_a_pair_has_a_name_and_a_value(word: str) -> None:
    for parse in (config._parse_columns, config._parse_texts, config._parse_weights):
        with pytest.raises(UsageError, match=f"^'{word}' is not of the form name=value; write for example "):
            parse([word])


def test_a_value_may_hold_an_equals_sign() -> None:
    assert config._parse_texts(["nli=Find x = y.", "b=c"]) == {"nli": "Find x = y.", "b": "c"}
    assert config._parse_weights(["short=0.25", "long=3"]) == {"short": 0.25, "long": 3.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    out: Path
    data: tuple[str, ...]
    mix: config.Weights = dataclasses.field(default_factory=dict)
    steps: int | None = None


def test_plain_data_and_back(tmp_path: Path) -> None:
    settings = Settings(out=Path("a/b"), data=("x", "y"), mix={"short": 0.5})
    plain = {"out": "a/b", "data": ["x", "y"], "mix": {"short": 0.5}, "steps": None}
    assert config.to_dict(settings) == plain
    (tmp_path / "run.json").write_text(json.dumps({"kind": "toy", "config": {"data": ["x", "y"], "steps": 3}}))
    found = config.from_file(Settings, tmp_path / "run.json")
    assert (found.data, found.steps, found.mix) == (("x", "y"), 3, {})
    assert found.out is tyro.MISSING, "what no run records is still to be given"
    for text, complaint in (("[1]", "holds no JSON object"), ("{", "cannot be read"), ('{"step": 1}', "'steps'")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UsageError, match=complaint):
            config.from_file(Settings, tmp_path / "run.json")


def test_values_that_must_be_above_zero() -> None:
    config.check_positive(a=1e-9, b=1)
    for value in (0, -1, float("nan")):
        with pytest.raises(UsageError, match=f"^batch_size is {value}; it must be above 0"):
            config.check_positive(steps=1, batch_size=value)


def test_the_nearest_name_is_offered() -> None:
    assert config.check_choice("precision", "bf16", ["fp32", "bf16"]) == "bf16"
    with pytest.raises(UsageError) as caught:
        config.check_choice("precision", "fp23", ["fp32", "bf16"])
    assert str(caught.value) == "precision 'fp23' is unknown (did you mean 'fp32'?); choose from fp32, bf16"
