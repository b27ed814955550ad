"""Opens what trainings and exports left: a student, an exported bundle, and a check that a teacher fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from llm2clip.artifacts import MANIFEST, RUN, read_json
from llm2clip.errors import ArtifactError, UsageError, one_line
from llm2clip.hub import cast

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llm2clip.student.model import Student
    from llm2clip.student.transform import ImageTransform

ROUTER, STUDENT_CONFIG = "router_config.json", "student_config.json"
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What loading damaged files raises."""


def check_match(
    student: Student,
    manifest: dict[str, Any],
    teacher: SentenceTransformer,
    *,
    student_name: str | Path,
    teacher_name: str | Path,
) -> None:
    """Check that a teacher is the one whose vectors a student was trained on.

    Args:
        manifest: the student's; one without a teacher's fingerprint (of another origin) is judged by width alone.

    Raises:
        UsageError: naming both fingerprints, or both widths.
    """
    from llm2clip.teacher.fingerprint import teacher_fingerprint

    wanted, width = student.config.teacher_dim, teacher.get_embedding_dimension()
    if width != wanted:
        raise UsageError(
            f"the teacher {teacher_name} gives {width} numbers a text, the student {student_name} reads {wanted}; "
            "give the teacher that its bank was built with"
        )
    expected, found = manifest.get("teacher_fingerprint"), None
    if expected is not None and (found := teacher_fingerprint(teacher)) != expected:
        raise UsageError(
            f"the teacher {teacher_name} has fingerprint {found}, the student {student_name} was trained with "
            f"{expected}; give the teacher that its bank was built with"
        )


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
            f"--out {out} was made of {model} when it had fingerprint {before}; it has {now} now: name a new folder or "
            f"delete {out}"
        )


def find_model(path_or_id: str | Path, *, revision: str | None = None) -> tuple[Path, str]:
    """The folder of a model (downloaded for a Hub id), and what it holds.

    Returns:
        The folder, and "llm2clip" for a student or an exported folder, "sentence-transformers" or "transformers".

    Raises:
        UsageError: if there is no model, or its weights are a pickle.
        ArtifactError: if it is not finished.
    """
    from llm2clip.teacher.opening import check_no_pickle

    folder = find_folder(path_or_id, revision=revision)
    check_no_pickle(folder, path_or_id)
    if (folder / RUN).exists() and not (folder / MANIFEST).exists():
        raise ArtifactError(f"{folder} is unfinished: run the command that makes it again, it goes on where it stopped")
    if is_bundle(folder):
        return folder, "llm2clip"
    if (folder / "modules.json").exists():
        return folder, "sentence-transformers"
    if not (folder / "config.json").exists():
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
        found = str(manifest.get("format", "")).removeprefix("llm2clip/")
        raise UsageError(f"{path_or_id} is no model: it holds {f'a {found}' if found else 'no config.json'}")
    kind = "llm2clip" if read_json(folder / "config.json").get("model_type") == "llm2clip" else "transformers"
    return folder, kind


def find_folder(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: itself, or the snapshot of a Hub id (downloaded if need be).

    Raises:
        UsageError: if there is neither.
    """
    name = str(path_or_id)
    if name.strip() and Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UsageError(f"{name or repr(name)} is no folder; give the folder of a model, or a Hub id (org/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.gguf", "*.onnx", "original/*"]))
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} is no folder here, and no Hub id that can be fetched: {one_line(error)}") from None


def is_bundle(folder: Path) -> bool:
    """Whether `folder` was written by `export --to sentence-transformers`."""
    return (folder / STUDENT_CONFIG).exists() and (folder / "modules.json").exists()


def student_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a student, or of one exported for transformers; empty for such a folder of another origin.

    Raises:
        UsageError: if `folder` holds something else.
        ArtifactError: if it is unfinished.
    """
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    _, kind = find_model(folder)
    if kind != "llm2clip":
        found = str(manifest.get("format", "")).removeprefix("llm2clip/") or f"a model for {kind}"
        raise UsageError(f"{folder} is no student (found: {found}); give a folder that train-student or export made")
    return dict(manifest)


def open_student(
    folder: Path, *, device: torch.device, dtype: torch.dtype | str | None = None
) -> tuple[Student, ImageTransform, dict[str, Any]]:
    """A student in evaluation mode, how its pictures are prepared, and its manifest (empty if there is none).

    Raises:
        UsageError: if `folder` holds something else.
        ArtifactError: if it is unfinished, damaged or lacks weights.
    """
    from llm2clip.student.model import Student
    from llm2clip.student.transform import ImageTransform

    manifest = student_manifest(folder)
    options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = Student.from_pretrained(folder, **options)
    except LOAD_ERRORS as error:
        raise ArtifactError(f"{folder} cannot be loaded as a student: {one_line(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        raise ArtifactError(f"{folder} lacks weights of the student, such as {sorted(report['missing_keys'])[0]}")
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        raise ArtifactError(
            f"{folder}: its weights do not fit its config.json: {name} is {list(found)}, expected {list(wanted)}"
        )
    return cast(model, device, dtype).eval(), ImageTransform.from_pretrained(folder), manifest


def open_bundle(
    folder: Path, *, device: torch.device, dtype: torch.dtype | str | None = None
) -> tuple[Student, ImageTransform, SentenceTransformer, dict[str, Any]]:
    """The student and teacher in an exported folder, put together without running the code files in it.

    Raises:
        ArtifactError: if it is damaged.
        UsageError: if the teacher needs code of its own, or weights are a pickle.
    """
    from llm2clip.student.transform import ImageTransform
    from llm2clip.teacher.opening import check_no_pickle

    check_no_pickle(folder, folder)
    parts = bundle_parts(folder)
    try:
        student: Any = _student_of(folder, parts)
        teacher: Any = _teacher_of(folder, parts)
    except LOAD_ERRORS as error:
        if isinstance(error, UsageError):
            raise
        raise ArtifactError(f"{folder} cannot be loaded: {one_line(error)}; export it again") from None
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    transform = ImageTransform.from_pretrained(folder / parts["tower"])
    student, teacher = (cast(model, device, dtype).eval() for model in (student, teacher))
    return student, transform, teacher, manifest


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
