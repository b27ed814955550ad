"""A report for people: the same tables as `report.md` and as one self-contained `report.html`."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.artifacts import atomic_path
from llm2clip.scores import KS

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
CRA_NAMES = {
    "cra": "a caption finds another of its image, among all",
    "cra_second": "an image's first caption finds its second, among all second ones",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 56rem; padding: 0 1rem; color: #1d2330; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d6dae2; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { text-align: left; color: #5a6477; padding-bottom: .3rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #e6e9ef; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figcaption { color: #5a6477; } .wrap { overflow-x: auto; }
svg { max-width: 100%; height: auto; } svg text { font-size: 11px; }
.positive { fill: #2f7d4f; } .negative { fill: #b4472f; }
@media (prefers-color-scheme: dark) {
  body { background: #14171d; color: #e4e7ee; }
  h2, th, td { border-color: #333a47; } caption, figcaption { color: #9aa4b5; }
  svg text { fill: #9aa4b5; } .positive { fill: #63b486; } .negative { fill: #dd7a62; }
}
"""


@dataclass(frozen=True)
class Table:
    """A titled table; `numbers` is the first column that is right-aligned."""

    title: str
    header: list[str]
    rows: list[list[str]]
    numbers: int = 1


def write_pages(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.md` and `report.html` for what `report.json` holds."""
    for name, text in (("report.md", as_markdown(report)), ("report.html", as_html(report))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = [f"# {title(report)}", _markdown_table(model_table(report))]
    for name in report["datasets"]:
        parts.append(f"## {name}")
        parts += [_markdown_table(table) for table in dataset_tables(report, name)]
    return "\n\n".join(parts) + "\n"


def as_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that loads nothing."""
    parts = [f"<h1>{html.escape(title(report))}</h1>", _html_table(model_table(report))]
    for name in report["datasets"]:
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += [_html_table(table) for table in dataset_tables(report, name)]
        parts.append(histogram(report["similarity"][name]))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title(report))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def title(report: Mapping[str, Any]) -> str:
    """The page's heading: what was scored."""
    config = report["config"]
    return f"Scores of {config.get('model') or config.get('teacher')}"


def model_table(report: Mapping[str, Any]) -> Table:
    """What was scored, and with what."""
    config, facts = report["config"], report["model"]
    rows = {
        "model": config.get("model"),
        "teacher": config.get("teacher"),
        "precision": config.get("precision"),
        **facts,
    }
    return Table("Model", ["what", "which"], [[k.replace("_", " "), str(v)] for k, v in rows.items() if v], numbers=2)


def dataset_tables(report: Mapping[str, Any], name: str) -> Iterator[Table]:
    """The tables of one dataset."""
    facts, metrics = report["datasets"][name], report["metrics"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts["captions"].items())
    if f"{name}/{next(iter(facts['captions']))}/i2t_r@1" in metrics:
        rows = [
            [
                *(kind, words),
                *(percent(metrics[f"{name}/{kind}/{way}_r@{k}"]) for k in KS),
                percent(report["chance"][f"{name}/{kind}/{way}_r@1"], digits=3),
            ]
            for kind in facts["captions"]
            for way, words in DIRECTIONS.items()
        ]
        header = ["captions", "direction", *(f"R@{k}" for k in KS), "R@1 by chance"]
        yield Table(f"Retrieval, % ({facts['images']:,} images; captions: {kinds})", header, rows, numbers=2)
    found = {
        **{words: f"{name}/{key}" for key, words in CRA_NAMES.items()},
        **{f"the same among {kind} captions alone": f"{name}/{kind}/cra" for kind in facts["captions"]},
    }
    rows = [[words, percent(metrics[key])] for words, key in found.items() if key in metrics]
    if rows:
        yield Table("Caption retrieval accuracy, %", ["what", "CRA"], rows)
    recalls = {f"{name}/{kind}/{way}_r@{k}" for kind in facts["captions"] for way in DIRECTIONS for k in KS}
    others = [key for key in metrics if key.startswith(f"{name}/") and key not in {*recalls, *found.values()}]
    rows = [
        [
            key.removeprefix(f"{name}/"),
            f"{metrics[key]:.4f}",
            f"{report['chance'][key]:.4f}" if key in report["chance"] else "",
        ]
        for key in others
    ]
    if rows:
        yield Table("Other scores", ["what", "score", "by chance"], rows)
    yield Table("Captions", ["what", "value"], list(_caption_rows(facts, report["similarity"][name])))
    if facts["bad"]["counts"]:
        counts = [[cause, f"{count:,}"] for cause, count in facts["bad"]["counts"].items()]
        yield Table(f"Left out: {facts['bad']['num_bad']:,} bad samples", ["defect", "times"], counts)


def _caption_rows(facts: Mapping[str, Any], profile: Mapping[str, Any]) -> Iterator[list[str]]:
    for kind, count in facts["captions"].items():
        yield [f"{kind} captions", f"{count:,}"]
    names = {
        "alignment": "alignment (squared distance of captions of one image)",
        "uniformity": "uniformity (lower: more spread out)",
        "positive_mean": "mean cosine, captions of one image",
        "negative_mean": "mean cosine, captions of different images",
    }
    for key, words in names.items():
        if profile[key] is not None:
            yield [words, f"{profile[key]:.3f}"]
    if "captions_cut" in facts:
        yield ["captions longer than the model reads, cut", f"{facts['captions_cut']:,}"]


def percent(fraction: float, *, digits: int = 1) -> str:
    """A fraction in per cent.

    >>> percent(0.4567), percent(0.0002, digits=3)
    ('45.7', '0.020')
    """
    return f"{100 * fraction:.{digits}f}"


def histogram(profile: Mapping[str, Any], *, width: int = 640, height: int = 200) -> str:
    """Similarities of captions of one image (above the line) and of different ones (below), as an SVG figure."""
    middle, bins = height / 2, len(profile["positive"])
    step, bars = width / bins, []
    for name, sign in (("positive", -1), ("negative", 1)):
        total = max(1, sum(profile[name]))
        highest = max(max(profile[name]) / total, 1e-9)
        for i, count in enumerate(profile[name]):
            if count:
                size = (middle - 4) * count / total / highest
                top = middle - size if sign < 0 else middle
                label = (
                    f"{name}: {profile['edges'][i]:.2f} to {profile['edges'][i + 1]:.2f}, {100 * count / total:.2f} %"
                )
                bars.append(
                    f'<rect class="{name}" x="{i * step + 0.5:.1f}" y="{top:.1f}" width="{step - 1:.1f}" '
                    f'height="{size:.1f}"><title>{label}</title></rect>'
                )
    ticks = "".join(
        f'<text x="{(value + 1) / 2 * width:.0f}" y="{height + 14}" text-anchor="{anchor}">{value:g}</text>'
        for value, anchor in ((-1, "start"), (-0.5, "middle"), (0, "middle"), (0.5, "middle"), (1, "end"))
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height + 20}" role="img" aria-label="Cosines of pairs of captions">'
        f"{''.join(bars)}{ticks}</svg><figcaption>Cosines of pairs of captions: of one image above, of different "
        "images below; each side by its own highest bar.</figcaption></figure>"
    )


def _markdown_table(table: Table) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [table.header, *table.rows]]
    rule = ["---" if i < table.numbers else "---:" for i in range(len(table.header))]
    lines = [f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]]]
    return "\n".join([f"{table.title}:", "", *lines])


def _html_table(table: Table) -> str:
    def row(tag: str, cells: list[str]) -> str:
        classes = [' class="number"' if i >= table.numbers else "" for i in range(len(cells))]
        return "".join(f"<{tag}{c}>{html.escape(cell)}</{tag}>" for cell, c in zip(cells, classes, strict=True))

    body = "\n".join(f"<tr>{row('td', cells)}</tr>" for cells in table.rows)
    head = f"<thead><tr>{row('th', table.header)}</tr></thead>"
    title_row = f"<caption>{html.escape(table.title)}</caption>"
    return f'<div class="wrap"><table>{title_row}{head}\n<tbody>{body}</tbody></table></div>'
