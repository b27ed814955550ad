"""Start a student: open a tower folder or Hub id, fit it to an image size, put the fresh parts around it."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPImageProcessor

from llm2clip.artifacts import check_name, read_json
from llm2clip.config import check_choice
from llm2clip.errors import ArtifactError, UsageError, one_line, setting
from llm2clip.hub import (
    LOAD_ERRORS,
    ModelFolder,
    drop_remote_code,
    find_model,
    listed,
    one_line_errors,
    quiet_transformers,
)
from llm2clip.on_hub import files_of, is_pickled
from llm2clip.released import is_released, known_teacher, released
from llm2clip.student.model import Student, StudentModelConfig
from llm2clip.student.official import open_released
from llm2clip.student.tower import (
    POOLINGS,
    build_options,
    build_tower,
    default_pooling,
    family_of,
    find_class,
    native_image_size,
    prune_tower,
    resize_tower,
    tower_width,
)
from llm2clip.student.transform import ImageTransform

logger = logging.getLogger("llm2clip")
DEFAULT_IMAGE_SIZE = 224
"""Side in pixels for towers whose config names none (convolutional ones)."""


class Tower(NamedTuple):
    """A vision tower that was found and can be a student's; its weights and image processor are read from its name.

    They are left to transformers, which fetches of a Hub id only what it reads.
    """

    name: str
    """A folder or Hub id."""
    revision: str | None
    config: Any
    """Of its vision half."""
    files: Sequence[str] = ()
    """In its folder, or of the Hub id."""
    whole: tuple[Student, ImageTransform] | None = None
    """The student that it is a part of, if a whole one was named: ours, or one that the paper's authors released."""
    teacher: str | None = None
    """Fingerprint of that student's teacher, as far as its folder says so."""
    half_of: Any = None
    """Config of the model of images and texts that it is half of, if it is."""

    @property
    def image_size(self) -> int:
        """Its own, in pixels."""
        return native_image_size(self.config) or DEFAULT_IMAGE_SIZE

    def __str__(self) -> str:
        return f"{setting('tower')} {self.name}"


def start_student(
    tower: str | Tower,
    *,
    teacher_dim: int,
    projection_dim: int = 1280,
    adaptor_blocks: int = 4,
    loss: str = "softmax",
    image_size: int | None = None,
    pooling: str | None = None,
    init: str = "pretrained",
    revision: str | None = None,
    transform: ImageTransform | None = None,
) -> Student:
    """A student around a tower, float32, its projection and adaptor fresh from torch's random generator.

    A student, ours or one that the paper's authors released, goes on as it is: tower, projection, adaptor and scale.

    Args:
        tower: folder or Hub id of any vision model of transformers; of CLIP-like models the vision half is taken.
        teacher_dim: width of the bank's vectors.
        projection_dim: width of the shared space.
        adaptor_blocks: 4 in the paper.
        loss: "softmax" or "sigmoid".
        image_size: side in pixels; None keeps the tower's own, another one interpolates its positions.
        pooling: one of `tower.POOLINGS`; None takes what suits the family.
        init: "pretrained", or "random" for weights drawn anew (only the tower's config is read).
        revision: branch, tag or commit of a Hub id.
        transform: from `open_transform`, where it is known already.

    Raises:
        UsageError: if `tower` is no vision tower, or does not fit the other arguments.

    Example:
        >>> student = start_student("openai/clip-vit-base-patch32", teacher_dim=2048)   # doctest: +SKIP
        >>> student.get_text_features(torch.randn(2, 2048)).shape                       # doctest: +SKIP
        torch.Size([2, 1280])
    """
    tower = open_tower(tower, revision=revision)
    image_size = image_size or tower.image_size
    if tower.whole is not None:
        given = {"dim": projection_dim, "adaptor_blocks": adaptor_blocks, "init": init}
        return go_on(tower, tower.whole[0], given, teacher_dim=teacher_dim, loss=loss, image_size=image_size)
    pooling = check_choice("pooling", pooling or default_pooling(tower.config), POOLINGS)
    with one_line_errors(f"{tower} cannot be used"):
        model = build_tower(tower.config, pooling=pooling) if init == "random" else load_tower(tower, pooling=pooling)
        if image_size != tower.image_size:
            model = resize_tower(model, image_size=image_size, pooling=pooling)
        width = tower_width(model, image_size=image_size, pooling=pooling)
    transform = transform or open_transform(tower, image_size=image_size)
    vision_config = copy.deepcopy(model.config)  # transformers writes its attention choice into a shared one
    vision_config.name_or_path = ""  # a local path says nothing where the student is used
    student_config = StudentModelConfig(
        vision_config=vision_config,
        tower_dim=width,
        teacher_dim=teacher_dim,
        projection_dim=projection_dim,
        adaptor_blocks=adaptor_blocks,
        pooling=pooling,
        image_size=image_size,
        image_mean=transform.mean,
        image_std=transform.std,
        loss=loss,
    )
    return Student(student_config, tower=model)


def open_tower(name: str | Tower, *, revision: str | None = None) -> Tower:
    """Find a tower and read its config; one that is found already is returned as it is.

    Raises:
        UsageError: if there is no model of this name, or it sees no images.
    """
    if isinstance(name, Tower):
        return name
    path, what = Path(name), f"{setting('tower')} {name}"
    is_folder = path.is_dir() and not is_released({}, (file.name for file in path.iterdir()))
    if is_folder and not (path / "config.json").exists():
        detail = "a SentenceTransformer (a teacher?)" if (path / "modules.json").exists() else "no config.json in it"
        raise UsageError(f"{what} is no vision model: {detail}; name the folder or Hub id of one")
    check_name(name, what=setting("tower"))
    if (folder := _released_folder(name, revision)) is not None:
        whole = open_released(folder)
        return Tower(name, revision, whole[0].config.vision_config, whole=whole)
    with one_line_errors(f"{what} cannot be used"):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if is_released(config.to_dict(), []):  # a copy under another name
        whole = open_released(find_model(name, revision=revision))
        return Tower(name, revision, whole[0].config.vision_config, whole=whole)
    if config.model_type == "llm2clip":
        folder = find_model(name, revision=revision)
        whole = open_own(folder)
        teacher = folder.manifest.get("teacher_fingerprint")
        return Tower(name, revision, whole[0].config.vision_config, whole=whole, teacher=teacher)
    both, config = config, getattr(config, "vision_config", config)  # the vision half of CLIP-like models
    if family_of(config).refused:
        raise UsageError(f"{what} is {family_of(config).refused}")
    if getattr(find_class(config), "main_input_name", "") != "pixel_values":
        raise UsageError(
            f"{what} is no vision model (model_type {config.model_type!r}); name a CLIP, SigLIP, DINOv2, ViT or timm "
            "tower (an LLM goes to `llm2clip train-teacher --model`)"
        )
    half_of = None if both is config else both
    return Tower(name, revision, config, files_of(name, revision=revision), half_of=half_of)


def open_own(folder: ModelFolder) -> tuple[Student, ImageTransform]:
    """A student that train-student or export made, every weight accounted for, and how its images are prepared.

    Raises:
        UsageError: if its image processor cannot be used.
        ArtifactError: if it is damaged or lacks weights.
    """
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
    if report["unexpected_keys"]:
        raise ArtifactError(
            f"{folder.name} holds weights that the student does not have: {listed(report['unexpected_keys'])}"
        )
    drop_remote_code(model)
    return model, ImageTransform.from_pretrained(folder.path, name=folder.name)


def _released_folder(name: str, revision: str | None) -> ModelFolder | None:
    """The folder of a student that the paper's authors released, or None if `name` is something else."""
    path = Path(name)
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        return find_model(name) if is_released(config, (file.name for file in path.iterdir())) else None
    found = None if released(name) is None else find_model(name, revision=revision)
    return found if found is not None and found.kind == "released" else None  # one of the same name is not


def go_on(
    tower: Tower, student: Student, given: Mapping[str, Any], *, teacher_dim: int, loss: str, image_size: int
) -> Student:
    """A trained student to be trained further, for images of `image_size` px and with the bias that a loss may need.

    Args:
        given: settings of a fresh student, which cannot be others here.

    Raises:
        UsageError: naming what does not fit it.
    """
    config: Any = copy.deepcopy(student.config)
    if teacher_dim != config.teacher_dim:
        teacher = known_teacher(tower.name)
        raise UsageError(
            f"{tower} reads vectors of {config.teacher_dim} numbers, the bank's have {teacher_dim}; build the bank "
            f"with its own teacher{f', {teacher}' if teacher else ''}"
        )
    own = {"dim": config.projection_dim, "adaptor_blocks": config.adaptor_blocks, "init": "pretrained"}
    for name, value in own.items():
        if given[name] != value:
            raise UsageError(f"{tower} is a whole student, which goes on as it is: give {setting(name, value)}")
    model = student.tower
    if image_size != tower.image_size:
        with one_line_errors(f"{tower} cannot be used"):
            model = resize_tower(model, image_size=image_size, pooling=config.pooling)
    config.vision_config, config.image_size, config.loss = copy.deepcopy(model.config), image_size, loss
    further = Student(config, tower=model)
    further.visual_projection, further.adaptor = student.visual_projection, student.adaptor
    further.logit_scale = student.logit_scale
    if None not in (student.logit_bias, further.logit_bias):
        further.logit_bias = student.logit_bias
    logger.info("%s: a whole student goes on, with its projection, adaptor and scale", tower)
    return further


def load_tower(tower: Tower, *, pooling: str) -> Any:
    """The tower's pretrained weights in float32.

    Raises:
        ValueError: if weights of the tower are missing from the checkpoint or have other shapes.
    """
    model, missing = load_model(tower, config=tower.config, **build_options(tower.config, pooling=pooling))
    if missing:  # some halves transformers finds by the names in the whole model alone
        whole, missing_of_whole = load_model(tower)
        half = getattr(whole, "vision_model", None)
        if type(half) is type(model) and not any(name.startswith("vision_model.") for name in missing_of_whole):
            model, missing = half, set()
    model = prune_tower(model, pooling=pooling)
    missing &= {name for name, _ in model.named_parameters()}
    if "pooler.layernorm.weight" in missing:  # starts at ones and zeros, as where its classifier is trained
        missing -= {"pooler.layernorm.weight", "pooler.layernorm.bias"}
    if missing:
        raise ValueError(f"its checkpoint lacks {len(missing)} of the tower's weights, such as {min(missing)}")
    return model


@contextlib.contextmanager
def _no_code_from(tower: Tower) -> Iterator[None]:
    """Say of a pickle that holds code what it is, and not how others would let it run."""
    try:
        yield
    except pickle.UnpicklingError:
        raise ValueError("its pytorch_model.bin holds more than tensors, which would run its code") from None


def load_model(tower: Tower, **options: Any) -> tuple[Any, set[str]]:
    """The model in the tower's folder, or by `options` its tower alone, and the names of weights that are not there."""
    with quiet_transformers(), _no_code_from(tower):  # it lists every weight of a CLIP's text half as unexpected
        model, report = AutoModel.from_pretrained(
            tower.name,
            revision=tower.revision,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=not is_pickled(tower.files),  # a `pytorch_model.bin` alone is read for tensors
            weights_only=True,  # of a pickle the tensors, and no code
            trust_remote_code=False,
            **options,
        )
    drop_remote_code(model)
    if left := listed(report["unexpected_keys"]):
        logger.info("%s: the vision tower is taken of it; left out: %s", tower, left)
    return model, set(report["missing_keys"])


def open_transform(tower: str | Tower, *, image_size: int | None = None, revision: str | None = None) -> ImageTransform:
    """How the tower wants its images, at `image_size` px; as CLIP does where its folder does not say.

    Raises:
        UsageError: if its images have no fixed size.
    """
    tower = open_tower(tower, revision=revision)
    native = tower.image_size
    if tower.whole is not None:
        return tower.whole[1] if image_size in (None, native) else tower.whole[1].at_size(image_size or native)
    try:
        processor = AutoImageProcessor.from_pretrained(tower.name, revision=tower.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ImportError) or (Path(tower.name) / "preprocessor_config.json").exists():
            raise UsageError(f"{tower}: its preprocessor_config.json cannot be used ({one_line(error)})") from None
        logger.info("%s has no preprocessor_config.json: its images are prepared as CLIP's", tower.name)
        processor = CLIPImageProcessor(size={"shortest_edge": native}, crop_size={"height": native, "width": native})
    transform = ImageTransform.from_processor(processor)
    wanted = image_size or native
    return transform if transform.image_size == (wanted, wanted) else transform.at_size(wanted)
