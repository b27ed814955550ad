"""A report's verdict in words, made from its numbers alone: against chance, and against a baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from llm2clip.eval.beside import is_by_language

WHAT = {
    "i2t_r@1": "images that find a caption of their own first",
    "t2i_r@1": "captions that find their image first",
    "top1": "images whose class is found first",
    "cra": "captions whose nearest other one is of the same image",
    "cra_second": "images whose first caption finds their second",
}
"""What a score is the share of; others are called by their names."""


def judge(report: Mapping[str, Any]) -> list[str]:
    """The verdict: against chance and against the baseline, what must be known to read it, then score by score.

    Of a recall the first place is judged, and in one line what lies further; nothing that chance gives anyway.
    """
    several = len(report["datasets"]) > 1
    lines = []
    for dataset, facts in report["datasets"].items():
        every = [n for n in report["intervals"] if n.startswith(f"{dataset}/") and report["chance"].get(n, 1.0) < 1]
        if is_by_language(report, dataset):  # the mean alone
            every = [name for name in every if "/" not in name.removeprefix(f"{dataset}/")]
        names = [name for name in every if name.partition("_r@")[2] in ("", "1")]
        further = [name for name in every if name not in names]
        found = [
            *_summary(report, names, further),
            *_further(report, further),
            *facts.get("notes", ()),
            *(_sentence(report, dataset, n) for n in names),
        ]
        lines += [f"{dataset}: {line}" if several else line for line in found]
    why = report["baseline"].get("why")
    return [*lines, f"no baseline: {why}"] if why else lines


def is_above_chance(report: Mapping[str, Any], name: str) -> bool:
    """Whether chance lies below a score's interval."""
    return bool(report["intervals"][name][0] > report["chance"][name])


def compared(report: Mapping[str, Any], name: str) -> str:
    """How a score stands to the baseline's: better or worse where their intervals lie apart; "" where there is none."""
    other = report["baseline"].get("intervals", {}).get(name)
    if other is None:
        return ""
    low, high = report["intervals"][name]
    return "better" if low > other[1] else "worse" if high < other[0] else "alike"


def _summary(report: Mapping[str, Any], names: list[str], further: list[str]) -> Iterator[str]:
    above = sum(is_above_chance(report, name) for name in names)
    if names and not above and not any(is_above_chance(report, name) for name in further):
        yield "no score is above chance: nothing shows that the model has learned to find anything here"
    elif names and above == len(names):
        yield "the model finds what it seeks: every score is above chance"
    elif names:
        yield f"{above} of {len(names)} scores are above chance, the others may be luck"
        if not above:
            more = sum(is_above_chance(report, name) for name in further)
            yield f"of those that look further (recall at 5 and more) {more} of {len(further)} are"
    counts = Counter(compared(report, name) for name in names)
    if counts.keys() - {""}:
        cut = report["baseline"].get("captions_cut")
        part = f" (which reads {cut:,} captions only in part)" if cut else ""
        yield (
            f"against the baseline {report['baseline']['model']}{part}: clearly better in {counts['better']} of "
            f"{len(names)} scores of the first place, clearly worse in {counts['worse']}, no clear difference in "
            f"{counts['alike']}"
        )


def _further(report: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    """Where more than the first place is looked at, if that shows a difference."""
    counts = Counter(compared(report, name) for name in names)
    if counts["better"] or counts["worse"]:
        yield (
            f"looking further than the first place (recall at 5 and more): clearly better in {counts['better']} of "
            f"{len(names)} scores, clearly worse in {counts['worse']}"
        )


def _sentence(report: Mapping[str, Any], dataset: str, name: str) -> str:
    kind, _, key = name.removeprefix(f"{dataset}/").rpartition("/")
    what = f"{WHAT[key]}{kind and f', {kind}'}" if key in WHAT else f"{kind}/{key}".lstrip("/")
    value, bounds, chance = (report[part][name] for part in ("metrics", "intervals", "chance"))
    low, high = (percent(bound) for bound in bounds)
    line = f"{what}: {percent(value)} % (95 % interval {low} to {high}), by chance {percent(chance)} %"
    if before := compared(report, name):
        line += f", the baseline {percent(report['baseline']['metrics'][name])} %"
        line += "" if before == "alike" else f": clearly {before}"
    return line if is_above_chance(report, name) else f"{line}; not above chance"


def percent(share: float) -> str:
    """A share in per cent, of a small one more digits.

    >>> percent(0.4567), percent(0.0002)
    ('45.7', '0.020')
    """
    return f"{100 * share:.1f}" if share >= 0.001 or not share else f"{100 * share:.3f}"
