"""A report's verdict in words, made from its numbers alone: against chance, and against a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WHAT = {
    "i2t_r@1": "images that find a caption of their own first",
    "t2i_r@1": "captions that find their image first",
    "cra": "captions whose nearest other one is of the same image",
    "cra_second": "images whose first caption finds their second",
}
"""What a score is the share of; others are called by their names."""


def judge(report: Mapping[str, Any]) -> list[str]:
    """The verdict: for each dataset a line on all its scores, and one on each."""
    lines = []
    for dataset, facts in report["datasets"].items():
        names = [name for name in report["intervals"] if name.startswith(f"{dataset}/") and _is_judged(report, name)]
        lines += [f"{dataset}: {line}" for line in (_summary(report, names), *facts.get("notes", ())) if line]
        lines += [f"{dataset}: {_sentence(report, dataset, name)}" for name in names]
    return [*lines, *_baseline_line(report)]


def _is_judged(report: Mapping[str, Any], name: str) -> bool:
    """Of a recall the first place alone; nothing that chance gives anyway."""
    return name.partition("_r@")[2] in ("", "1") and report["chance"].get(name, 1.0) < 1


def is_above_chance(report: Mapping[str, Any], name: str) -> bool:
    """Whether chance lies below a score's interval."""
    return bool(report["intervals"][name][0] > report["chance"][name])


def _summary(report: Mapping[str, Any], names: list[str]) -> str:
    above = sum(is_above_chance(report, name) for name in names)
    if not names:
        return ""
    if not above:
        return "no score is above chance: nothing shows that the model has learned to find anything here"
    if above == len(names):
        return "the model finds what it seeks: every score is above chance"
    return f"{above} of {len(names)} scores are above chance, the others may be luck"


def _sentence(report: Mapping[str, Any], dataset: str, name: str) -> str:
    kind, _, key = name.removeprefix(f"{dataset}/").rpartition("/")
    what = f"{WHAT[key]}{kind and f', {kind}'}" if key in WHAT else f"{kind}/{key}".lstrip("/")
    value, (low, high), chance = (report[part][name] for part in ("metrics", "intervals", "chance"))
    place = "above" if is_above_chance(report, name) else "not above"
    line = f"{what}: {percent(value)} (95 % interval {percent(low)} to {percent(high)}), {place} chance"
    before = report["baseline"].get("metrics", {}).get(name)
    compared = "" if before is None else f"; the baseline has {percent(before)}: {_compared(report, name)}"
    return f"{line} ({percent(chance)}){compared}"


def _compared(report: Mapping[str, Any], name: str) -> str:
    (low, high), (other_low, other_high) = report["intervals"][name], report["baseline"]["intervals"][name]
    if low > other_high:
        return "clearly better than it"
    if high < other_low:
        return "clearly worse than it"
    return "no clear difference, as the two intervals overlap"


def _baseline_line(report: Mapping[str, Any]) -> Iterator[str]:
    baseline = report["baseline"]
    if "why" in baseline:
        yield f"no baseline: {baseline['why']}"
    elif baseline:
        cut = baseline.get("captions_cut")
        yield f"the baseline is {baseline['model']}{f', which reads {cut:,} captions only in part' if cut else ''}"


def percent(share: float) -> str:
    """A share in per cent, of a small one more digits.

    >>> percent(0.4567), percent(0.0002)
    ('45.7 %', '0.020 %')
    """
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else f"{100 * share:.3f} %"
