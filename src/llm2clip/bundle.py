"""The bundle: a student and its teacher as one SentenceTransformer folder for texts and images; written and read here.

A Router leads texts through the teacher's own modules and the adaptor, images through the tower and its projection;
both legs end in unit length. Reading it back runs none of the code files that lie in it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm2clip.artifacts import read_json, write_json
from llm2clip.errors import ArtifactError, UsageError, one_line, setting
from llm2clip.hub import LOAD_ERRORS, STUDENT_CONFIG, ModelFolder, cast, compare_weights, listed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llm2clip.student.model import Student
    from llm2clip.student.transform import ImageTransform

ROUTER = "router_config.json"


def save_bundle(
    folder: Path,
    student: Student,
    transform: ImageTransform,
    teacher: SentenceTransformer,
    *,
    prompt: str | None = None,
) -> None:
    """Write a student and its teacher into `folder`.

    Args:
        folder: there, and empty.
        student: in evaluation mode.
        transform: how its images are prepared.
        teacher: gives the vectors that the adaptor reads.
        prompt: what is put before each text; None for the teacher's own default, "" for nothing.

    Raises:
        UsageError: if the teacher has modules that come with code of their own.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    from llm2clip.student.tower import load_options

    options = load_options(type(student.tower), student.config.pooling)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tower-") as tower:
        transform.save_with(student.tower, Path(tower))
        legs = {
            "text": _text_leg(student, teacher),
            "image": _image_leg(student, tower, options, image_size=transform.image_size),
        }
        router = Router(
            legs,  # type: ignore[arg-type]
            default_route="text",
            route_mappings={(None, "text"): "text", (None, "image"): "image"},
        )
        prompts, default = _prompts(teacher, prompt)
        bundle = SentenceTransformer(modules=[router], prompts=prompts, default_prompt_name=default, device="cpu")
        bundle.save_pretrained(str(folder), create_model_card=False)
    if options:  # sentence-transformers reads such options when it loads the tower, but does not write them
        file = folder / bundle_parts(folder)["tower"] / "sentence_bert_config.json"
        write_json(file, {**read_json(file), "model_kwargs": options})
    config = json.loads(student.config.to_json_string(use_diff=False))
    # without transformers' own notes, such as the folder that the student was read from
    write_json(folder / STUDENT_CONFIG, {name: value for name, value in config.items() if not name.startswith("_")})


def _text_leg(student: Student, teacher: SentenceTransformer) -> list[torch.nn.Module]:
    """The teacher's own modules, the adaptor, unit length."""
    from sentence_transformers.base.modules import Normalize

    from llm2clip.student.adaptor_module import AdaptorModule
    from llm2clip.teacher.joined_module import Joined

    modules = list(teacher.children())
    for module in modules:
        if not isinstance(module, Joined) and not type(module).__module__.startswith("sentence_transformers."):
            raise UsageError(
                f"the teacher's module {type(module).__name__} comes with code of its own, which one folder cannot "
                f"hold; use {setting('to', 'transformers')} and keep the teacher beside it"
            )
    config = student.config
    adaptor = AdaptorModule(
        config.teacher_dim, config.projection_dim, config.adaptor_blocks, normalize=config.adaptor_norm
    )
    adaptor.adaptor.load_state_dict(student.adaptor.state_dict())
    return [*modules, adaptor, Normalize()]


def _image_leg(
    student: Student, tower: str, options: dict[str, bool], *, image_size: tuple[int, int]
) -> list[torch.nn.Module]:
    """The tower in the folder `tower`, read off as the student does, its projection if any, unit length."""
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from llm2clip.student.tower_module import TowerModule

    config = student.config
    output, pooling = _read_off(student, image_size)
    module = Transformer if config.vision_config.model_type in MODEL_MAPPING_NAMES else TowerModule
    # Named: left to itself it would pool the first token, also for families that pool otherwise.
    transformer = module(
        tower,
        model_kwargs=dict(options),
        modality_config={"image": {"method": "forward", "method_output_name": output}},
        module_output_name="token_embeddings" if pooling else "sentence_embedding",
    )
    between: list[torch.nn.Module] = [Pooling(config.tower_dim, pooling_mode=pooling)] if pooling else []
    if isinstance(student.visual_projection, torch.nn.Linear):
        values = {name: value.detach().cpu().clone() for name, value in student.visual_projection.named_parameters()}
        projection = Dense(
            config.tower_dim,
            config.projection_dim,
            bias="bias" in values,
            activation_function=torch.nn.Identity(),
            init_weight=values["weight"],
            init_bias=values.get("bias"),
        )
        between.append(projection)
    return [transformer, *between, Normalize()]


def _read_off(student: Student, image_size: tuple[int, int]) -> tuple[str, Any]:
    """The tower's output that holds the image's vector, and how its tokens are pooled; None if it is one vector."""
    if student.config.pooling != "pooler":
        return "last_hidden_state", student.config.pooling
    with torch.inference_mode():
        blank = torch.zeros(1, 3, *image_size, dtype=student.dtype, device=student.device)
        pooled = student.tower(pixel_values=blank).pooler_output
    # Some convolutional towers pool to a 1 x 1 map, which sentence-transformers takes for a sequence of one token.
    return "pooler_output", "mean" if pooled.ndim == 4 else None


def _prompts(teacher: Any, prompt: str | None) -> tuple[dict[str, str] | None, str | None]:
    """The prompts of the folder, all of them what the adaptor knows, and the name of the one put before every text."""
    from llm2clip.teacher.model import prompts_of

    prompts = prompts_of(prompt if prompt is not None else teacher.prompts.get(teacher.default_prompt_name or "") or "")
    return prompts, "caption" if prompts else None


def open_bundle(
    folder: ModelFolder, *, device: torch.device, dtype: torch.dtype | str | None = None
) -> tuple[Student, ImageTransform, SentenceTransformer]:
    """The student and teacher in an exported folder, put together without running the code files in it.

    Raises:
        ArtifactError: if it is damaged or lacks weights.
        UsageError: if the teacher needs code of its own.
    """
    from llm2clip.student.transform import ImageTransform

    parts = bundle_parts(folder.path, name=folder.name)
    try:
        student: Any = _student_of(folder.path, parts)
        teacher: Any = _teacher_of(folder, parts)
        (missing, left), (others, more) = (compare_weights(part, folder.path) for part in (student.tower, teacher))
    except LOAD_ERRORS as error:
        if isinstance(error, UsageError):
            raise
        raise ArtifactError(f"{folder.name} cannot be loaded: {one_line(error)}; export it again") from None
    if missing or others:
        raise ArtifactError(f"{folder.name} lacks weights, such as {[*missing, *others][0]}; export it again")
    if left or more:
        raise ArtifactError(f"{folder.name} holds weights that its models do not have: {listed([*left, *more])}")
    transform = ImageTransform.from_pretrained(folder.path / parts["tower"], name=folder.name)
    student, teacher = (cast(model, device, dtype).eval() for model in (student, teacher))
    return student, transform, teacher


def bundle_parts(folder: Path, *, name: str = "") -> dict[str, Any]:
    """Where the parts of an exported folder lie, relative to it; messages call it `name`.

    Returns:
        `tower`, `projection` (if the student has one) and `adaptor`: folders; `teacher`: class and folder of each of
            its modules.

    Raises:
        ArtifactError: if it has no router.
    """
    router = next(folder.rglob(ROUTER), None)
    if router is None:
        raise ArtifactError(f"{name or folder} holds no {ROUTER}; export it again")
    settings, root = read_json(router), router.parent.relative_to(folder)
    place = {name: (root / name).as_posix() for name in settings["types"]}
    image, text = settings["structure"]["image"], settings["structure"]["text"]
    return {
        "tower": place[image[0]],
        "projection": place[image[-2]],  # what follows both legs is Normalize
        "adaptor": place[text[-2]],
        "teacher": [(settings["types"][name], place[name]) for name in text[:-2]],
    }


def _student_of(folder: Path, parts: dict[str, Any]) -> Student:
    from safetensors.torch import load_file
    from sentence_transformers.base.modules import Transformer

    from llm2clip.student.model import Student, StudentModelConfig
    from llm2clip.student.tower import find_class

    config = StudentModelConfig.from_dict(read_json(folder / STUDENT_CONFIG))
    find_class(config.vision_config)  # which AutoModel may not know by itself
    tower = Transformer.load(str(folder), subfolder=parts["tower"], model_kwargs={"use_safetensors": True}).model
    student = Student(config, tower=tower)
    if student.config.projection == "linear":
        projection = load_file(folder / parts["projection"] / "model.safetensors")
        student.visual_projection.load_state_dict(
            {name.removeprefix("linear."): value for name, value in projection.items()}
        )
    adaptor = load_file(folder / parts["adaptor"] / "model.safetensors")
    student.adaptor.load_state_dict({name.removeprefix("adaptor."): value for name, value in adaptor.items()})
    return student


def _teacher_of(folder: ModelFolder, parts: dict[str, Any]) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    facts = read_json(folder.path / "config_sentence_transformers.json")
    return SentenceTransformer(
        modules=[_load_module(folder, kind, place) for kind, place in parts["teacher"]],
        prompts=facts.get("prompts"),
        default_prompt_name=facts.get("default_prompt_name"),
        device="cpu",
    )


def _load_module(folder: ModelFolder, kind: str, place: str) -> Any:
    """One of a teacher's modules, if it is sentence-transformers' own or ours."""
    from sentence_transformers.util import import_from_string

    from llm2clip.teacher.joined_module import Joined

    if kind == f"{Joined.__module__}.{Joined.__name__}":
        return Joined.load(str(folder.path), subfolder=place)
    if not kind.startswith("sentence_transformers."):
        raise UsageError(
            f"{folder.name}: the teacher in it has a module of its own ({kind}); open the folder with "
            "SentenceTransformer(folder, trust_remote_code=True) if you trust it"
        )
    module: Any = import_from_string(kind)
    return module.load(str(folder.path), subfolder=place)
