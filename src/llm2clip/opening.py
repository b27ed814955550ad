"""Opens a trained student, says where it comes from, and checks that a teacher is its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm2clip.artifacts import MANIFEST, read_json
from llm2clip.errors import UsageError, setting
from llm2clip.hub import ModelFolder, cast
from llm2clip.released import released

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llm2clip.student.model import Student
    from llm2clip.student.transform import ImageTransform


def check_match(
    student: Student, folder: ModelFolder, teacher: SentenceTransformer, *, teacher_name: str | Path | ModelFolder
) -> None:
    """Check that a teacher is the one whose vectors a student was trained on.

    Args:
        folder: the student's; without a teacher's fingerprint in its manifest it is judged by width alone.

    Raises:
        UsageError: naming both fingerprints, or both widths.
    """
    from llm2clip.teacher.fingerprint import teacher_fingerprint

    wanted, width = student.config.teacher_dim, teacher.get_embedding_dimension()
    if width != wanted:
        raise UsageError(
            f"the teacher {teacher_name} gives {width} numbers a text, the student {folder.name} reads {wanted}; "
            "give the teacher that its bank was built with"
        )
    expected, found = folder.manifest.get("teacher_fingerprint"), None
    if expected is not None and (found := teacher_fingerprint(teacher)) != expected:
        raise UsageError(
            f"the teacher {teacher_name} has fingerprint {found}, the student {folder.name} was trained with "
            f"{expected}; give the teacher that its bank was built with"
        )


def check_images_fit(folder: ModelFolder) -> None:
    """Raise a UsageError about another's model whose images llm2clip does not prepare, as training does."""
    from llm2clip.student.tower import FAMILIES

    for config in (folder.config, folder.config.get("vision_config", {})):
        family = FAMILIES.get(config.get("model_type", ""))
        if family is not None and family.refused:
            raise UsageError(f"{setting('model')} {folder.name} is {family.refused}")


def origin_of(manifest: Mapping[str, Any], folder: ModelFolder | None = None) -> dict[str, Any]:
    """Of a student's or an export's manifest, what says where the model comes from; of a released one, its name."""
    config = manifest.get("config", {})
    kept = ["fingerprint", "teacher_fingerprint", "prompt", "source", "tower", "tower_revision", "kinds"]
    kept += ["steps", "num_samples", "batch_size"]
    found = {name: manifest.get(name, config.get(name)) for name in kept}
    # not of the settings of a run: a name that was good where it ran is another's, or nobody's, elsewhere
    found["teacher"] = manifest.get("teacher") if isinstance(manifest.get("teacher"), str) else None
    if folder is not None and folder.kind == "released":
        known = released(folder.name)
        found |= {"source": source_of(folder), **({} if known is None else known._asdict())}
    return {name: value for name, value in found.items() if value is not None}


def source_of(folder: ModelFolder) -> str:
    """A model's name, with the commit where it is a snapshot of the Hub's cache."""
    is_snapshot = folder.path.parent.name == "snapshots"
    return f"{folder.name}@{folder.path.name}" if is_snapshot else Path(folder.name).name


def check_unchanged(out: Path, model: str | Path, before: str | None) -> None:
    """Check that a model is still the one that a finished `out` was made of, where both say so.

    Raises:
        UsageError: naming both fingerprints.
    """
    manifest = Path(model) / MANIFEST
    now = read_json(manifest).get("fingerprint") if manifest.exists() else None
    if None not in (before, now) and before != now:
        raise UsageError(
            f"{setting('out')} {out} was made of {model} when it had fingerprint {before}; it has {now} now: name a "
            f"new folder or delete {out}"
        )


def open_student(
    folder: ModelFolder, *, device: torch.device, dtype: torch.dtype | str | None = None
) -> tuple[Student, ImageTransform]:
    """A student in evaluation mode, and how its images are prepared.

    Raises:
        UsageError: if `folder` holds something else.
        ArtifactError: if it is damaged or lacks weights.
    """
    from llm2clip.student.official import open_released
    from llm2clip.student.start import open_own

    if folder.kind == "released":
        model, transform = open_released(folder)
        return cast(model, device, dtype), transform
    if folder.kind != "student":
        found = folder.made or f"a model for {folder.kind}"
        raise UsageError(
            f"{folder.name} is no student (found: {found}); give a folder that train-student or export made"
        )
    model, transform = open_own(folder)
    return cast(model, device, dtype).eval(), transform
