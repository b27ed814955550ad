"""Settings that cannot be are refused with what to type."""

from __future__ import annotations

from typing import Any

import pytest

from llm2clip.bank.config import BankConfig, BankExportConfig, BankVerifyConfig
from llm2clip.errors import UsageError


def config(**settings: Any) -> BankConfig:
    return BankConfig(**{"data": ("a.csv",), "teacher": "teacher", "out": "bank", **settings})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"dtype": "float8"}, "^dtype 'float8' is unknown"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"shard_rows": 0}, "^shard_rows is 0"),
        ({"batch_tokens": -1}, "^batch_tokens is -1"),
        ({"shard": "3"}, "write i/n"),
        ({"shard": "8/8"}, "with i from 0 to n-1"),
        ({"prompt": "x", "prompt_name": "query"}, "give one of the two"),
        ({"max_bad_fraction": 2.0}, "^max_bad_fraction is 2.0"),
        ({"data": ()}, "neither is given"),
        ({"benchmark": ("urban1k",), "root": "b"}, "both are given; leave one out"),
        ({"data": (), "benchmark": ("urban1k",)}, "benchmark urban1k takes root='DIR'"),
        ({"data": (), "benchmark": ("urban",), "root": "b"}, "did you mean 'urban1k'"),
        ({"data": (), "benchmark": ("urban1k",), "root": "b", "views": {"long": "rest"}}, "^views is about sources"),
    ],
)
def test_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        config(**settings)


def test_parts() -> None:
    assert config().part() == (0, 1)
    assert config(shard="2/8").part() == (2, 8)


def test_settings_are_what_decides_the_content() -> None:
    quick = config(device="cuda", shard="0/2", batch_tokens=100, compile=True, reuse=("other",), out="elsewhere")
    assert quick.settings() == config().settings()
    assert config(dtype="int8").settings() != config().settings()


def test_other_configs() -> None:
    with pytest.raises(UsageError, match=r"^rows_per_file is 0"):
        BankExportConfig(bank="bank", out="out", rows_per_file=0)
    with pytest.raises(UsageError, match=r"^min_cosine is 1\.5"):
        BankVerifyConfig(bank="bank", min_cosine=1.5)
