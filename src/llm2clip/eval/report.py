"""A report for people: `report.md`, and `report.html` with images, one file that loads nothing; both by templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape

from llm2clip.artifacts import atomic_path
from llm2clip.eval.beside import (
    change_of,
    compare_tables,
    is_by_language,
    language_values,
    length_values,
    named_tables,
    protocol_tables,
)
from llm2clip.eval.tables import DIRECTIONS, Table, percent
from llm2clip.eval.verdict import judge
from llm2clip.journal import logged
from llm2clip.scores import KS

PAGES = ("report.md", "report.html")
TEMPLATES = Path(__file__).parent
CRA_NAMES = {
    "cra": "a caption finds another of its image, among all",
    "cra_second": "an image's first caption finds its second, among all second ones",
}
SIMILARITY = {
    "alignment": "alignment (squared distance of captions of one image)",
    "uniformity": "uniformity (lower: more spread out)",
    "positive_mean": "mean cosine, captions of one image",
    "negative_mean": "mean cosine, captions of different images",
}
CURVES = {
    "loss": "loss",
    "accuracy": "share of a batch's images whose own caption scores best",
    "val/r@1": "R@1 on the held-out bank, mean",
}
"""Of a training's log what is drawn."""
SIDES = ("95 % interval", "by chance", "baseline")
"""What stands beside a score."""
POINTS = 300
"""Of a curve at most."""


def write_pages(folder: Path, report: Mapping[str, Any], galleries: Mapping[str, Any], *, log: Path | None) -> None:
    """Write `report.md` and `report.html`.

    Args:
        report: what `report.json` holds.
        galleries: dataset -> its gallery, see `llm2clip.eval.gallery`.
        log: of the model's training, if there is one.
    """
    drawn = {} if log is None else curves(log)
    for name in PAGES:
        with atomic_path(folder / name) as temporary:
            temporary.write_text(render(name, report, galleries=galleries, curves=drawn), encoding="utf-8")


def render(template: str, report: Mapping[str, Any], **more: Any) -> str:
    """The report as the template says it."""
    config = report["config"]
    return (
        environment()
        .get_template(template)
        .render(
            title=f"Scores of {config.get('model') or config.get('teacher')}",
            verdict=judge(report),
            scores={name: list(score_tables(report, name)) for name in report["datasets"]},
            facts={name: list(fact_tables(report, name)) for name in report["datasets"]},
            model=model_table(report),
            compare=list(compare_tables(report)),
            languages={name: language_values(report, name) for name in report["datasets"]},
            lengths={name: length_values(facts) for name, facts in report["datasets"].items()},
            similarity=report["similarity"],
            **more,
        )
    )


def environment() -> Environment:
    """Where the templates lie, and what they may use."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True
    )
    found.filters["cell"] = lambda text: text.replace("|", "\\|")
    return found


def score_tables(report: Mapping[str, Any], name: str) -> Iterator[Table]:
    """The scores of a dataset, each with its interval, chance and the baseline's."""
    facts, metrics = report["datasets"][name], report["metrics"]
    kinds = ", ".join(f"{count:,} {kind}".strip() for kind, count in facts["captions"].items())
    shown = ("",) if is_by_language(report, name) else facts["captions"]  # languages have a table of their own
    recalls = {
        (kind, way): ["/".join(filter(None, [name, kind, f"{way}_r@{k}"])) for k in KS]
        for kind in shown
        for way in DIRECTIONS
    }
    recalls = {place: keys for place, keys in recalls.items() if keys[0] in metrics}
    if recalls:
        table = Table(
            f"Retrieval, % ({facts['images']:,} images; captions: {kinds})",
            ["captions", "direction", "of", *(f"R@{k}" for k in KS)],
            numbers=3,
        )
        for (kind, way), keys in recalls.items():
            sides = list(_sides(report, keys))
            names = [[kind, DIRECTIONS[way]], *[["", ""]] * (len(sides) - 1)]
            table.rows.extend([*place, *side] for place, side in zip(names, sides, strict=True))
        yield table
    words = {
        **{f"{name}/{key}": words for key, words in CRA_NAMES.items()},
        **{f"{name}/{kind}/cra": f"the same among {kind} captions alone" for kind in facts["captions"]},
    }
    yield from named_tables(report, name)
    seen = {key for keys in recalls.values() for key in keys}
    left = [key for key in metrics if key.startswith(f"{name}/") and key not in seen]
    if is_by_language(report, name):
        left = [key for key in left if "/" not in key.removeprefix(f"{name}/")]
    for title, keys in (
        ("Caption retrieval accuracy, %", [key for key in words if key in left]),
        ("Other scores, %", [key for key in left if key not in words]),
    ):
        rows = [[words.get(key, key.removeprefix(f"{name}/")), *_line(report, key)] for key in keys]
        if rows:
            yield Table(title, ["what", "score", *SIDES], rows)


def _sides(report: Mapping[str, Any], keys: list[str]) -> Iterator[list[str]]:
    """Rows below another: the model, its interval, chance, the baseline; the last three where there are such."""
    columns = [
        dict(zip(("model", "95 % interval", "by chance", "baseline"), _line(report, key), strict=True)) for key in keys
    ]
    for side in columns[0]:
        cells = [column[side] for column in columns]
        if any(cells):
            yield [side, *cells]


def _line(report: Mapping[str, Any], key: str) -> list[str]:
    """A score, its interval, chance and the baseline's score; "" for what there is not."""
    low, high = report["intervals"].get(key, (None, None))
    chance, before = report["chance"].get(key), report["baseline"].get("metrics", {}).get(key)
    return [
        percent(report["metrics"][key]),
        "" if low is None else f"{percent(low)} to {percent(high)}",
        "" if chance is None else percent(chance, digits=3),
        "" if before is None else f"{percent(before)}{_difference(report, key)}",
    ]


def _difference(report: Mapping[str, Any], key: str) -> str:
    """What the model has more than the baseline, where both were scored image by image."""
    change = report["baseline"].get("differences", {}).get(key)
    return f" ({change_of(change)})" if change else ""


def fact_tables(report: Mapping[str, Any], name: str) -> Iterator[Table]:
    """What is known of a dataset beside its scores."""
    facts, profile = report["datasets"][name], report["similarity"].get(name, {})
    rows = [[f"{kind} captions".strip(), f"{count:,}"] for kind, count in facts["captions"].items()]
    rows += [[words, f"{profile[key]:.3f}"] for key, words in SIMILARITY.items() if profile.get(key) is not None]
    if "captions_cut" in facts:
        rows.append(["captions longer than the model reads, cut", f"{facts['captions_cut']:,}"])
    if rows:
        yield Table("Captions", ["what", "value"], rows)
    if confused := facts.get("confused"):
        rows = [[own, other, f"{count:,}"] for own, other, count in confused]
        yield Table("Classes taken for another most often", ["class", "taken for", "images"], rows, numbers=2)
    if facts["bad"]["counts"]:
        counts = [[cause, f"{count:,}"] for cause, count in facts["bad"]["counts"].items()]
        yield Table(f"Left out: {facts['bad']['num_bad']:,} bad samples", ["defect", "times"], counts)
    if "fingerprint" in facts:
        yield Table("Source", ["what", "which"], [["fingerprint", facts["fingerprint"]]], numbers=2)
    yield from protocol_tables(report, name)


def model_table(report: Mapping[str, Any]) -> Table:
    """What was scored, and with what."""
    config = report["config"]
    named = {key: config.get(key) for key in ("model", "teacher", "precision")}
    rows = {**named, **report["model"], "baseline": report["baseline"].get("model")}
    return Table("Model", ["what", "which"], [[k.replace("_", " "), str(v)] for k, v in rows.items() if v], numbers=2)


def curves(log: Path) -> list[tuple[str, list[tuple[float, float]]]]:
    """The curves of a training, each with its title, as points of step and value; of long ones some."""
    found = []
    for key, title in CURVES.items():
        points = [(line["step"], line[key]) for line in logged(log, key)]
        if len(points) > 1:
            places = np.linspace(0, len(points) - 1, min(POINTS, len(points))).round().astype(int)
            found.append((title, [points[i] for i in places]))
    return found
