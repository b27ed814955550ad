"""The model card of an exported folder: what it is, where it comes from, code that runs, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.artifacts import read_json
from llm2clip.errors import ArtifactError, UsageError, setting
from llm2clip.export.format import Format

TEMPLATE = Path(__file__).with_name("card.md")
TAGS = ["llm2clip", "image-text-retrieval", "clip"]


def write_card(folder: Path, form: Format, facts: dict[str, Any], *, scores: dict[str, float] | None) -> None:
    """Write `folder/README.md`.

    Args:
        form: the folder's format.
        facts: as in the manifest.
        scores: metric name to fraction, from a report; None leaves the section out.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Template

    height, width = facts["image_size"]
    words = {
        **facts,
        "images": f"images of {width} x {height} px, prepared as `preprocessor_config.json` says",
        "space": f"vectors of {facts['dim']} numbers, compared by cosine",
    }
    card = ModelCard.from_template(
        ModelCardData(library_name=form.library, pipeline_tag=form.task, tags=TAGS),
        template_path=str(TEMPLATE),
        title=form.title,
        contents=Template(form.contents).render(words),
        use=Template(form.use).render(words),
        origin=origin(facts),
        scores=scores,
    )
    card.save(folder / "README.md")


def origin(facts: dict[str, Any]) -> dict[str, Any]:
    """Tower, teacher, bank and steps, as far as the student's manifest tells."""
    tower = str(facts.get("tower") or "unknown")
    if tower.startswith(("/", ".", "~")):  # a path says nothing elsewhere
        tower = Path(tower).name
    found = {
        "tower": f"{tower} ({facts['tower_type']})",
        "fingerprint of the teacher": facts.get("teacher_fingerprint"),
        **{name.replace("_", " "): facts.get(name) for name in ("fingerprint", "num_samples", "steps", "batch_size")},
    }
    return {name: value for name, value in found.items() if value}


def read_scores(report: Path) -> dict[str, float]:
    """The metrics of a `report.json`.

    Raises:
        UsageError: if it is no report.
    """
    if not report.is_file():
        raise UsageError(f"{setting('report')} {report} is no file; give the report.json that evaluate wrote")
    try:
        data = read_json(report)
    except ArtifactError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("metrics"), dict):
        raise UsageError(f"{setting('report')} {report} holds no metrics; give the report.json that evaluate wrote")
    return dict(data["metrics"])
