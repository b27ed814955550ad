"""Opens what trainings and exports left: a student, an exported bundle, and a check that a teacher fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from llm2clip.artifacts import MANIFEST, read_json
from llm2clip.errors import ArtifactError, UsageError, one_line, setting
from llm2clip.hub import STUDENT_CONFIG, ModelFolder, cast, missing_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llm2clip.student.model import Student
    from llm2clip.student.transform import ImageTransform

ROUTER = "router_config.json"
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What loading damaged files raises."""


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


def origin_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Of a student's or an export's manifest, what says where the model comes from."""
    config = manifest.get("config", {})
    kept = ("fingerprint", "teacher_fingerprint", "prompt", "tower", "steps", "num_samples", "batch_size")
    found = {name: manifest.get(name, config.get(name)) for name in kept}
    return {name: value for name, value in found.items() if value is not None}


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
    from llm2clip.student.model import Student
    from llm2clip.student.transform import ImageTransform

    if folder.kind != "student":
        found = folder.made or f"a model for {folder.kind}"
        raise UsageError(
            f"{folder.name} is no student (found: {found}); give a folder that train-student or export made"
        )
    options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = Student.from_pretrained(folder.path, **options)
    except LOAD_ERRORS as error:
        raise ArtifactError(f"{folder.name} cannot be loaded as a student: {one_line(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        raise ArtifactError(f"{folder.name} lacks weights of the student, such as {sorted(report['missing_keys'])[0]}")
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        raise ArtifactError(
            f"{folder.name}: its weights do not fit its config.json: {name} is {list(found)}, expected {list(wanted)}"
        )
    return cast(model, device, dtype).eval(), ImageTransform.from_pretrained(folder.path)


def open_bundle(
    folder: ModelFolder, *, device: torch.device, dtype: torch.dtype | str | None = None
) -> tuple[Student, ImageTransform, SentenceTransformer]:
    """The student and teacher in an exported folder, put together without running the code files in it.

    Raises:
        ArtifactError: if it is damaged or lacks weights.
        UsageError: if the teacher needs code of its own.
    """
    from llm2clip.student.transform import ImageTransform

    parts = bundle_parts(folder.path)
    try:
        student: Any = _student_of(folder.path, parts)
        teacher: Any = _teacher_of(folder.path, parts)
        missing = [name for model in (student.tower, teacher) for name in missing_weights(model, folder.path)]
    except LOAD_ERRORS as error:
        if isinstance(error, UsageError):
            raise
        raise ArtifactError(f"{folder.name} cannot be loaded: {one_line(error)}; export it again") from None
    if missing:
        raise ArtifactError(f"{folder.name} lacks weights, such as {missing[0]}; export it again")
    transform = ImageTransform.from_pretrained(folder.path / parts["tower"])
    student, teacher = (cast(model, device, dtype).eval() for model in (student, teacher))
    return student, transform, teacher


def _student_of(folder: Path, parts: dict[str, Any]) -> Student:
    from safetensors.torch import load_file
    from sentence_transformers.base.modules import Transformer

    from llm2clip.student.model import Student, StudentModelConfig

    tower = Transformer.load(str(folder), subfolder=parts["tower"], model_kwargs={"use_safetensors": True}).model
    student = Student(StudentModelConfig.from_dict(read_json(folder / STUDENT_CONFIG)), tower=tower)
    weight = load_file(folder / parts["projection"] / "model.safetensors")["linear.weight"]
    student.visual_projection.load_state_dict({"weight": weight})
    adaptor = load_file(folder / parts["adaptor"] / "model.safetensors")
    student.adaptor.load_state_dict({name.removeprefix("adaptor."): value for name, value in adaptor.items()})
    return student


def _teacher_of(folder: Path, parts: dict[str, Any]) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    facts = read_json(folder / "config_sentence_transformers.json")
    return SentenceTransformer(
        modules=[_load_module(folder, kind, place) for kind, place in parts["teacher"]],
        prompts=facts.get("prompts"),
        default_prompt_name=facts.get("default_prompt_name"),
        device="cpu",
    )


def bundle_parts(folder: Path) -> dict[str, Any]:
    """Where the parts of an exported folder lie, relative to it.

    Returns:
        `tower`, `projection` and `adaptor`: folders; `teacher`: class and folder of each of its modules.
    """
    router = next(folder.rglob(ROUTER), None)
    if router is None:
        raise ArtifactError(f"{folder} holds no {ROUTER}; export it again")
    settings, root = read_json(router), router.parent.relative_to(folder)
    place = {name: (root / name).as_posix() for name in settings["types"]}
    image, text = settings["structure"]["image"], settings["structure"]["text"]
    return {
        "tower": place[image[0]],
        "projection": place[image[-2]],  # what follows both legs is Normalize
        "adaptor": place[text[-2]],
        "teacher": [(settings["types"][name], place[name]) for name in text[:-2]],
    }


def _load_module(folder: Path, kind: str, place: str) -> Any:
    """One of a teacher's modules, if it is sentence-transformers' own or ours."""
    from sentence_transformers.util import import_from_string

    from llm2clip.teacher.joined_module import Joined

    if kind == f"{Joined.__module__}.{Joined.__name__}":
        return Joined.load(str(folder), subfolder=place)
    if not kind.startswith("sentence_transformers."):
        raise UsageError(
            f"{folder}: the teacher in it has a module of its own ({kind}); open the folder with "
            "SentenceTransformer(folder, trust_remote_code=True) if you trust it"
        )
    module: Any = import_from_string(kind)
    return module.load(str(folder), subfolder=place)
