"""What a report says of named benchmarks: printed scores, languages, other models, and the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm2clip.eval.tables import DIRECTIONS, Table, percent

MAIN = ("r@1", "top1", "cra", "cra_second")
"""How the names of the scores end by which models are compared."""


def is_by_language(report: Mapping[str, Any], name: str) -> bool:
    """Whether a dataset is a benchmark of several languages, with a mean over them."""
    return name in report.get("protocol", {}) and len(report["datasets"][name]["captions"]) > 1


def named_tables(report: Mapping[str, Any], name: str) -> Iterator[Table]:
    """The printed scores of a benchmark beside the measured ones, and its languages."""
    facts, metrics = report["datasets"][name], report["metrics"]
    if published := report.get("protocol", {}).get(name, {}).get("published"):
        keys = {"i2t_r@1": "i2t", "t2i_r@1": "t2i"} if facts["captions"] else {"top1": "i2t"}
        ours = [metrics.get(f"{name}/{key}") for key in keys]
        rows = [["this model", *("" if value is None else percent(value) for value in ours), "measured here"]]
        for row in published:
            cells = [_and_ours(row[field], value) for field, value in zip(keys.values(), ours, strict=True)]
            rows.append([row["model"], *cells, row["source"]])
        columns = list(DIRECTIONS.values()) if len(keys) > 1 else ["top-1"]
        yield Table("Beside what is printed, % (this model's difference to it)", ["model", *columns, "source"], rows)
    if is_by_language(report, name):
        before, table = report["baseline"].get("metrics", {}), []
        for part, count in facts["captions"].items():
            there = [f"{name}/{part}/{way}_r@1" for way in DIRECTIONS]
            if there[0] not in metrics:
                continue
            low, high = report["intervals"][there[1]]
            other = percent(before[there[1]]) if there[1] in before else ""
            scores = [percent(metrics[key]) for key in there]
            table.append([part, f"{count:,}", *scores, f"{percent(low)} to {percent(high)}", other])
        header = ["language", "captions", *DIRECTIONS.values(), "95 % interval", "baseline"]
        if table:
            yield Table("By language, R@1, % (interval and baseline: text to image)", header, table)


def _and_ours(printed: float, ours: float | None) -> str:
    return f"{printed}" if ours is None else f"{printed} ({100 * ours - printed:+.1f})"


def language_values(report: Mapping[str, Any], name: str) -> list[tuple[str, float]]:
    """Text to image R@1 of each language of a benchmark, the best first; [] where there are no languages."""
    if not is_by_language(report, name):
        return []
    keys = {part: f"{name}/{part}/t2i_r@1" for part in report["datasets"][name]["captions"]}
    found = [(part, report["metrics"][key]) for part, key in keys.items() if key in report["metrics"]]
    return sorted(found, key=lambda pair: -pair[1])


def length_values(facts: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Text to image R@1 by the captions' length; [] of a dataset, given by its facts, whose captions are alike long.

    >>> length_values({"by_length": [{"tokens": n, "captions": 1, "t2i_r@1": 0.5} for n in ("up to 20", "over 300")]})
    [('up to 20 (1)', 0.5), ('over 300 (1)', 0.5)]
    """
    found = facts.get("by_length", ())
    return [(f"{each['tokens']} ({each['captions']:,})", each["t2i_r@1"]) for each in found if len(found) > 1]


def change_of(change: Mapping[str, float]) -> str:
    """A difference between two models in points, and how likely chance gives none.

    >>> change_of({"difference": 0.0123, "low": 0.001, "high": 0.02, "p": 0.03})
    '+1.2; p 0.03'
    """
    return f"{100 * change['difference']:+.1f}; p {change['p']:.3g}"


def compare_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """The main scores of all models side by side, with what each differs from the first, and p where that is known."""
    others = report.get("compare", {})
    if not others:
        return
    first = report["config"].get("model") or report["config"].get("teacher")
    table = Table("Models side by side, % (difference to the first; p)", ["score", first, *others])
    for key, value in report["metrics"].items():
        dataset, _, score = key.partition("/")
        if not score.endswith(MAIN) or (is_by_language(report, dataset) and "/" in score):
            continue
        row = [key, percent(value)]
        for found in others.values():
            change, other = found["differences"].get(key), found["metrics"].get(key)
            told = f" ({change_of(change)})" if change else ""
            row.append("" if other is None else f"{percent(other)}{told}")
        table.rows.append(row)
    yield table


def protocol_tables(report: Mapping[str, Any], name: str) -> Iterator[Table]:
    """How a benchmark was scored, by its card."""
    if protocol := report.get("protocol", {}).get(name):
        rows = [[what, _words(value)] for what, value in _protocol_rows(protocol)]
        yield Table("Protocol", ["what", "how"], rows, numbers=2)


def _protocol_rows(protocol: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a protocol says, but for what is shown elsewhere; counts that nobody checked are marked."""
    for what, value in protocol.items():
        if what in protocol["not_checked"]:
            yield what, "as found, not checked: the protocol's own count is not known"
        elif value and what not in ("published", "not_checked", "found", "fetch"):
            yield what.replace("_", " "), value


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {count:,}" for key, count in value.items())
    return " · ".join(value) if isinstance(value, tuple | list) else f"{value:,}" if isinstance(value, int) else value
