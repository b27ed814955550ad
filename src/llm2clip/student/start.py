"""Start a student: open a tower folder or Hub id, fit it to a picture size, put the fresh parts around it."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, CLIPImageProcessor

from llm2clip.errors import UsageError, one_line, setting
from llm2clip.hub import quiet_transformers
from llm2clip.student.model import Student, StudentModelConfig
from llm2clip.student.tower import (
    build_tower,
    default_pooling,
    native_image_size,
    prune_tower,
    resize_tower,
    tower_width,
    vision_half,
)
from llm2clip.student.transform import ImageTransform

logger = logging.getLogger("llm2clip")
DEFAULT_IMAGE_SIZE = 224
"""Side in pixels for towers whose config names none (convolutional ones)."""


def start_student(
    tower: str,
    *,
    teacher_dim: int,
    projection_dim: int = 1280,
    adaptor_blocks: int = 4,
    loss: str = "softmax",
    image_size: int | None = None,
    pooling: str | None = None,
    init: str = "pretrained",
    revision: str | None = None,
) -> Student:
    """A student around a tower, float32, its projection and adaptor fresh from torch's random generator.

    Args:
        tower: folder or Hub id of any vision model of transformers; of CLIP-like models the vision half is taken.
        teacher_dim: width of the bank's vectors.
        projection_dim: width of the shared space.
        adaptor_blocks: 4 in the paper.
        loss: "softmax" or "sigmoid".
        image_size: side in pixels; None keeps the tower's own, another one interpolates its positions.
        pooling: None takes what suits the family, see `tower.default_pooling`.
        init: "pretrained", or "random" for weights drawn anew (only the tower's config is read).
        revision: branch, tag or commit of a Hub id.

    Raises:
        UsageError: if `tower` is no vision tower, or does not fit the other arguments.

    Example:
        >>> student = start_student("openai/clip-vit-base-patch32", teacher_dim=2048)   # doctest: +SKIP
        >>> student.get_text_features(torch.randn(2, 2048)).shape                       # doctest: +SKIP
        torch.Size([2, 1280])
    """
    config = open_tower_config(tower, revision=revision)
    pooling = pooling or default_pooling(config)
    with _one_line(f"{setting('tower')} {tower}"):
        model = (
            build_tower(config, pooling=pooling)
            if init == "random"
            else load_tower(tower, config, pooling=pooling, revision=revision)
        )
        native = native_image_size(config) or DEFAULT_IMAGE_SIZE
        if image_size is not None and image_size != native:
            model = resize_tower(model, image_size=image_size)
        image_size = image_size or native
        width = tower_width(model, image_size=image_size, pooling=pooling)
    transform = open_transform(tower, image_size=image_size, revision=revision)
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


def open_tower_config(tower: str, *, revision: str | None = None) -> Any:
    """The config of a vision tower.

    Raises:
        UsageError: if there is no model at `tower`, or it sees no pictures.
    """
    path = Path(tower)
    if path.is_dir() and not (path / "config.json").exists():
        detail = "a SentenceTransformer (a teacher?)" if (path / "modules.json").exists() else "no config.json in it"
        raise UsageError(f"{setting('tower')} {tower} is no vision model: {detail}; name the folder or Hub id of one")
    if not path.exists() and tower.startswith((".", "/", "~")):
        raise UsageError(f"{setting('tower')} {tower} does not exist; name the folder or Hub id of a vision model")
    with _one_line(f"{setting('tower')} {tower}"):
        config = AutoConfig.from_pretrained(tower, revision=revision, trust_remote_code=False)
    if config.model_type == "llm2clip":
        raise UsageError(
            f"{setting('tower')} {tower} is a student; write its tower with `llm2clip export --to tower` first"
        )
    config = vision_half(config)
    if config.model_type.startswith("siglip2"):
        raise UsageError(
            f"{setting('tower')} {tower} is a SigLIP2 of variable resolution (NaFlex); take one of fixed resolution, "
            "such as google/siglip2-so400m-patch14-224"
        )
    model_class = MODEL_MAPPING.get(type(config), None)
    if getattr(model_class, "main_input_name", "") != "pixel_values":
        raise UsageError(
            f"{setting('tower')} {tower} is no vision model (model_type {config.model_type!r}); name a CLIP, "
            "SigLIP, DINOv2, ViT or timm tower (an LLM goes to `llm2clip train-teacher --model`)"
        )
    return config


def load_tower(tower: str, config: Any, *, pooling: str, revision: str | None = None) -> Any:
    """The tower's pretrained weights in float32.

    Raises:
        ValueError: if weights of the tower are missing from the checkpoint or have other shapes.
    """
    with quiet_transformers():  # it lists every weight of a CLIP's text half as unexpected
        model, report = AutoModel.from_pretrained(
            tower,
            config=config,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
        )
    model = prune_tower(model, pooling=pooling)
    present = dict(model.named_parameters())
    missing = sorted(name for name in report["missing_keys"] if name in present)
    if missing:
        raise ValueError(f"its checkpoint lacks {len(missing)} of the tower's weights, such as {missing[0]}")
    return model


def open_transform(tower: str, *, image_size: int | None = None, revision: str | None = None) -> ImageTransform:
    """How the tower wants its pictures, at `image_size` px; as CLIP does where its folder does not say.

    Raises:
        UsageError: if its pictures have no fixed size.
    """
    config = open_tower_config(tower, revision=revision)
    native = native_image_size(config) or DEFAULT_IMAGE_SIZE
    try:
        processor = AutoImageProcessor.from_pretrained(tower, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ImportError) or (Path(tower) / "preprocessor_config.json").exists():
            raise UsageError(
                f"{setting('tower')} {tower}: its preprocessor_config.json cannot be used ({one_line(error)})"
            ) from None
        logger.info("%s has no preprocessor_config.json: its pictures are prepared as CLIP's", tower)
        processor = CLIPImageProcessor(size={"shortest_edge": native}, crop_size={"height": native, "width": native})
    transform = ImageTransform.from_processor(processor)
    wanted = image_size or native
    return transform if transform.image_size == (wanted, wanted) else transform.at_size(wanted)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what transformers says about a model that cannot be opened into one line about `what`."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{what} cannot be used: {one_line(error)}") from None
