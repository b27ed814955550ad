"""What a benchmark yields: rows of a figure, what it is against, how far it spread, and the card's clock.

A row is a dictionary: `name`, `value`, `unit`; where they apply `ratio` and `against` (what it is the ratio to),
`spread` (least and largest ratio of the rounds, or value where there is no ratio), `clock_mhz` of the GPU just after,
`rounds` where time cut them ("2 of 3 rounds"), `reason` in the place of a value that was not measured, and `replaces`,
true if it takes the place of an earlier row of its name.
"""

from __future__ import annotations

from typing import Any

HEADER = "| what | value | ratio | against |\n|---|---|---|---|"


def not_measured(name: str, reason: str) -> dict[str, Any]:
    """The row of a figure that there is not."""
    return {"name": name, "value": None, "unit": "", "reason": reason}


def line(row: dict[str, Any]) -> str:
    """A row as a line of a Markdown table."""
    value = "not measured" if row["value"] is None else f"{row['value']:,.4g} {row['unit']}"
    ratio = "" if row.get("ratio") is None else f"{row['ratio']:.3f}"
    spread = " to ".join(f"{bound:,.3g}" if ratio == "" else f"{bound:.2f}" for bound in row.get("spread") or ())
    clock = f"{row['clock_mhz']:,} MHz" if row.get("clock_mhz") else ""
    notes = ", ".join(
        note for note in (row.get("against"), spread, clock, row.get("rounds"), row.get("reason")) if note
    )
    return " | ".join((f"| {row['name']}", value.strip(), ratio, f"{notes} |"))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    return "\n".join([HEADER, *map(line, rows)])


def spread(values: list[float]) -> tuple[float, float] | None:
    """The least and the largest of several values; None where there is but one."""
    return (min(values), max(values)) if len(values) > 1 else None
