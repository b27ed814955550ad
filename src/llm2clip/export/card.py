"""The model card of an exported folder: what it is, where it comes from, code that runs, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.artifacts import MANIFEST, read_json
from llm2clip.errors import ArtifactError, UsageError, setting
from llm2clip.export.format import Format

TEMPLATE = Path(__file__).with_name("card.md")
TAGS = ["llm2clip", "image-text-retrieval", "clip"]


def write_card(
    folder: Path,
    form: Format,
    facts: dict[str, Any],
    *,
    scores: dict[str, float] | None,
    protocol: Sequence[str] = (),
) -> None:
    """Write `folder/README.md`.

    Args:
        form: the folder's format.
        facts: as in the manifest.
        scores: metric name to fraction, from a report; None leaves the section out.
        protocol: what each dataset of it was, a sentence each.
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
        protocol=protocol,
    )
    card.save(folder / "README.md")


def origin(facts: dict[str, Any]) -> dict[str, Any]:
    """Tower, teacher, bank and steps, as far as the student's manifest tells."""
    found = {
        "student": facts.get("source"),
        "LLM of the teacher": shown_name(facts["llm"]) if facts.get("llm") else None,
        "tower": f"{shown_name(facts.get('tower') or 'unknown')} ({facts['tower_type']})",
        "fingerprint of the teacher": facts.get("teacher_fingerprint"),
        **{name.replace("_", " "): facts.get(name) for name in ("fingerprint", "num_samples", "steps", "batch_size")},
    }
    return {name: value for name, value in found.items() if value}


def read_scores(report: Path) -> tuple[dict[str, float], list[str]]:
    """The metrics of a `report.json`, and what each of its datasets was.

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
    return dict(data["metrics"]), [
        f"{name}: {facts['images']:,} images, captions: "
        + ", ".join(f"{number:,} {kind}" for kind, number in facts["captions"].items())
        for name, facts in (data.get("datasets") or {}).items()
    ]


def is_place(name: str) -> bool:
    """Whether a setting names a place on this machine, and not something on the Hub or a text."""
    return name.startswith(("/", "./", "../", "~")) or (len(name) < 256 and "\n" not in name and Path(name).exists())


def shown_name(part: Any) -> str:
    """A model's name, or several, as others can read it: of a folder here the last part."""
    if isinstance(part, (list, tuple)):
        return ", ".join(map(shown_name, part))
    return Path(part).name if is_place(str(part)) else str(part)


def llm_of(teacher: str | None) -> str | list[str] | None:
    """The LLM that a teacher's folder was trained from, or the members it joins; of a Hub id the id."""
    if teacher is None:
        return None
    manifest = Path(teacher) / MANIFEST
    facts = read_json(manifest) if manifest.is_file() else {}
    members = members_of(facts.get("config", {})) or facts.get("llm")  # the latter in one that was pushed
    if not members:
        return str(teacher)
    return str(members[0]) if len(members) == 1 else [shown_name(member) for member in members]


def members_of(config: Mapping[str, Any]) -> list[str]:
    """What a teacher is made of by the settings in its manifest: the LLM that was trained, and what is joined."""
    trained = [config["model"], *config.get("join", ())] if config.get("model") else []
    return trained or list(config.get("teachers", ()))
