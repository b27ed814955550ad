"""Each speed benchmark that has a tiny size runs to its end: a change in the package must not break them unnoticed."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.ci
@pytest.mark.parametrize("name", ["encode", "loader", "loss", "step"])
def test_a_tiny_benchmark_measures_all_that_needs_no_peer(name: str) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    rows = list(benchmark.run([benchmark.SETTINGS["tiny"]], "cpu", None))
    missing = {row["name"]: row["reason"] for row in rows if row["value"] is None}
    assert len(rows) > len(missing), missing
    assert all("not installed" in why or "no GPU" in why for why in missing.values()), missing
