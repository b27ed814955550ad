"""The settings of stage 1: an earlier run's manifest is a command line of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llm2clip.cli import parse
from llm2clip.errors import UsageError
from llm2clip.teacher.config import TeacherConfig, for_eval

CONFIG = TeacherConfig(
    data=("a.tar", "b.tar"),
    captions={"short": "s"},
    eval_data=("held-out.csv",),
    model="llm",
    out=Path("teacher"),
    pair_weights={"short+long": 2.0},
    instructions={"nli": "Find an entailed sentence."},
    steps=5,
)


def test_a_manifest_gives_the_same_settings_again(tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"format": "llm2clip/teacher", "config": CONFIG.settings()}))
    again = parse("train-teacher", ["--config", str(file), "--out", "other", "--workers", "3"])
    assert again == dataclasses.replace(CONFIG, out=Path("other"), workers=3)
    assert again.settings() == CONFIG.settings()
    with pytest.raises(UsageError, match="--out"):
        parse("train-teacher", ["--config", str(file)])


def test_flags_reach_their_fields():
    words = "--data x.csv --model m --out o --pair-weights short+long=1 --no-random-negative --eval-every 10 --mntp"
    config = parse("train-teacher", words.split())
    assert config.pair_weights == {"short+long": 1.0} and not config.random_negative
    assert config.eval_every == 10 and config.mntp


def test_held_out_captions_are_read_as_the_training_ones():
    held_out = for_eval(CONFIG)
    assert held_out.data == ("held-out.csv",) and held_out.captions == {"short": "s"}


def test_frozen_weights_are_held_in_the_precision_and_trained_ones_in_full():
    dtypes = {
        tuning: dataclasses.replace(CONFIG, tuning=tuning, precision="bf16", adaptor_layers=1).load_dtype
        for tuning in ("lora", "full", "frozen")
    }
    assert dtypes == {"lora": "bfloat16", "full": "float32", "frozen": "bfloat16"}
