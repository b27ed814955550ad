"""Tables and verdicts by hand; the ceiling against a count by brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from demo import results
from demo.results import Value
from demo.write import PER_KIND, TEST_KINDS, captioned


def value(*samples: float) -> Value:
    return Value(samples, 100)


def test_spread_over_seeds_and_of_one_seed() -> None:
    assert value(0.1, 0.3).mean == pytest.approx(0.2)
    assert value(0.1, 0.3).spread == pytest.approx(math.sqrt(0.02))
    assert value(0.5).spread == pytest.approx(0.05)  # sqrt(0.5 * 0.5 / 100)
    assert value(0.0).spread > 0  # nothing found among 100 does not mean that nothing ever will be


def test_gaps_are_taken_seed_by_seed() -> None:
    gap = value(0.5, 0.7).minus(value(0.4, 0.6))
    assert gap.samples == pytest.approx((0.1, 0.1)) and gap.spread == pytest.approx(0)


def test_the_gap_of_one_seed_is_as_uncertain_as_both_its_sides() -> None:
    gap = value(0.5).minus(value(0.2))
    assert gap.spread == pytest.approx(math.hypot(0.05, 0.04))


def found(d: float, b: float, spread: float = 0.01) -> dict[str, dict[str, Value]]:
    """All arms at `b` but the D ones at `d`, all columns alike."""
    names = [*results.COLUMNS, *results.CRA_ENGLISH]
    arms = [f"{arm}-{share}" for arm in results.ARMS for share in ("all", "tenth")]
    arms += ["A", *(f"teacher-{teacher}" for teacher in results.TEACHERS)]
    high = {"D-all", "D-tenth", "teacher-lora"}
    return {
        arm: {n: value(*((d if arm in high else b) + s for s in (-spread, 0.0, spread))) for n in names} for arm in arms
    }


def test_verdicts_follow_the_numbers() -> None:
    better = {v.claim: v.shown for v in results.verdicts(found(0.6, 0.2))}
    equal = {v.claim: v.shown for v in results.verdicts(found(0.3, 0.3))}
    worse = {v.claim: v.shown for v in results.verdicts(found(0.2, 0.6))}
    last = "Full fine-tuning in stage 1 is above LoRA on every column"
    assert {shown for claim, shown in better.items() if claim != last} == {"shows"}
    assert better[last].startswith("the reverse shows")
    assert set(equal.values()) == {"does not show"}
    assert all(shown.startswith("the reverse shows") for claim, shown in worse.items() if claim != last)


def test_a_claim_that_holds_in_some_columns_shows_in_part() -> None:
    mixed = found(0.6, 0.2)
    mixed["D-all"]["unseen/i2t_r@1"] = value(0.2, 0.2, 0.2)
    shown = {v.claim: v.shown for v in results.verdicts(mixed)}
    assert shown["D is above B and B-long on words never seen with an image"].startswith("shows in part (2 of 4")


def test_a_gap_within_its_spread_is_none() -> None:
    gap = results._verdict("c", [("g", value(0.1, 0.0, -0.02))])
    assert gap.shown == "does not show"


def test_ceilings_count_what_a_perfect_model_could_not_tell_apart() -> None:
    limits = results.ceilings(60, seed=1)
    samples = list(captioned("test", 60, seed=1, kinds=TEST_KINDS))
    total = 0.0
    for sample in samples:
        for claim in sample.claims["unseen"]:
            total += 1 / sum(claim.holds(other.scene) for other in samples)
    assert limits["unseen/t2i_r@1"] == pytest.approx(total / (60 * PER_KIND))
    assert 0.5 < limits["short/i2t_r@1"] <= 1
    assert "long/t2i_r@1" not in limits


def test_collect_reads_every_pipelines_report(tmp_path: Path) -> None:
    for seed, score in ((0, 0.25), (1, 0.75)):
        folder = tmp_path / f"seed-{seed}" / "scores" / "A"
        folder.mkdir(parents=True)
        report = {"datasets": {"captions": {"images": 40}}, "metrics": {"captions/short/i2t_r@1": score}}
        (folder / "report.json").write_text(json.dumps(report))
    found = results.collect([tmp_path / "seed-0", tmp_path / "seed-1"])
    assert found == {"A": {"short/i2t_r@1": Value((0.25, 0.75), 40)}}
    assert results.as_json(found) == {"A": {"short/i2t_r@1": [0.25, 0.75]}}
