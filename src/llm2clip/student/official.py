"""The students that the paper's authors released, as students of ours: their three layouts, key by key.

Nothing of them is run: weights come from safetensors, or from `torch.load(weights_only=True)`, which reads tensors
alone. Every key has its place, or is named.

Letters: W tower width, T teacher width, D shared width, N tokens of an image.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from llm2clip.errors import ArtifactError, UsageError, one_line
from llm2clip.hub import LOAD_ERRORS, ModelFolder, listed
from llm2clip.released import weight_files
from llm2clip.student.model import Student, StudentModelConfig
from llm2clip.student.tower import default_pooling
from llm2clip.student.transform import ImageTransform

logger = logging.getLogger("llm2clip")
Weights = dict[str, Tensor]
BLOCKS = 4
"""Residual blocks of their adaptors."""
PARTS = {"norm": "ln", "expand": "fn.0", "shrink": "fn.3"}
"""Of a block of the adaptor: our names and theirs."""
EVA_NAMES = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.norm": "mlp.ffn_ln", "mlp.fc2": "mlp.w3"}
EVA_NAMES |= {"attn.norm": "attn.inner_attn_ln"}
"""Of a block of EVA02: timm's names and theirs."""
EVA_HEAD, SIGLIP_HEAD = 64, 72
"""Width of an attention head, which no weight tells."""


class Layout(NamedTuple):
    """How the weights of one kind of released student are named."""

    tower: str
    """What stands before the tower's."""
    adaptor: str
    """What stands before the adaptor's, up to the number of a part."""
    settings: Callable[[Weights, ModelFolder], dict[str, Any]]
    """What `StudentModelConfig` takes, but for the widths that the adaptor tells."""
    name: Callable[[str], str] = lambda name: name
    """Their name, behind the prefix, of a weight of our tower."""
    projection: str | None = "visual_projection"
    unused: str = "$^"
    """What may lie there and is not needed: values that are computed."""
    left_out: str = "$^"
    """What is named in the log and left out."""


def open_released(folder: ModelFolder) -> tuple[Student, ImageTransform]:
    """A released student as one of ours, float32, in evaluation mode, and how its images are prepared.

    Raises:
        UsageError: if it needs timm, or is another's.
        ArtifactError: if a weight is missing, too much or of another shape.
    """
    weights = read_weights(folder)
    layout = find_layout(weights, folder)
    name_parts_of_blocks(weights, layout)
    top = f"{layout.adaptor}{BLOCKS + 1}.weight"
    dim, teacher_dim = needed(weights, top, folder).shape
    config = StudentModelConfig(
        **layout.settings(weights, folder), teacher_dim=teacher_dim, projection_dim=dim, adaptor_blocks=BLOCKS
    )
    try:
        student = Student(config)
    except LOAD_ERRORS as error:
        raise ArtifactError(f"{folder.name}: there is no tower of its sizes: {one_line(error)}") from None
    fill(student, weights, layout, folder)
    return student.eval(), _transform(folder, config.image_size)


def read_weights(folder: ModelFolder) -> Weights:
    """All its weights by their names in the file, without what training may have wrapped around them.

    Raises:
        ArtifactError: if they cannot be read, or more than tensors would have to be.
    """
    files = weight_files(folder.config, [path.name for path in folder.path.iterdir()])
    if not files:
        raise ArtifactError(f"{folder.name} holds no weights (*.safetensors, *.bin or *.pt)")
    weights: Weights = {}
    for file in files:
        found: Any = _read_file(folder.path / file, f"{folder.name}: {file}")
        for wrapper in ("state_dict", "model", "module"):
            found = found[wrapper] if isinstance(found, dict) and isinstance(found.get(wrapper), dict) else found
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ArtifactError(f"{folder.name}: {file} holds other things than named tensors")
        weights |= found
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _read_file(file: Path, name: str) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArtifactError(f"{name} holds more than tensors, which would run its code, or is damaged") from None
    except (*LOAD_ERRORS, EOFError) as error:
        raise ArtifactError(f"{name} cannot be read: {one_line(error)}; get it again") from None


def find_layout(weights: Weights, folder: ModelFolder) -> Layout:
    """The layout that the names of the weights show.

    Raises:
        UsageError: if it is none, or the image half alone.
    """
    for layout in LAYOUTS:
        if any(name.startswith(layout.tower) for name in weights):
            if not any(name.startswith(layout.adaptor) for name in weights):
                raise UsageError(
                    f"{folder.name} holds the image half alone, without the adaptor ({layout.adaptor}*); of EVA02 it "
                    "is in the .pt of the same repository"
                )
            return layout
    raise UsageError(f"{folder.name} is no released student: its weights are named {listed(weights) or 'nothing'}")


def needed(weights: Weights, name: str, folder: ModelFolder) -> Tensor:
    """A weight that the sizes of others are read off.

    Raises:
        ArtifactError: if it is not there.
    """
    if name not in weights:
        raise ArtifactError(f"{folder.name} lacks weights of the student, such as {name}")
    return weights[name]


def name_parts_of_blocks(weights: Weights, layout: Layout) -> None:
    """Give the parts of the adaptor's blocks the names of the authors' training code, told by their shapes.

    Those in transformers' format were never seen; shapes leave no choice: a vector is the norm's weight, [2T, T]
    widens, [T, 2T] narrows.
    """
    known = tuple(PARTS.values())
    for name in list(weights):
        found = re.fullmatch(re.escape(layout.adaptor) + r"([0-3])\.(.+)\.weight", name)
        if found is None or found[2] in known:
            continue
        shape = weights[name].shape
        part = "ln" if len(shape) == 1 else "fn.0" if shape[0] > shape[-1] else "fn.3"
        for kind in ("weight", "bias"):
            before, after = (f"{layout.adaptor}{found[1]}.{each}.{kind}" for each in (found[2], part))
            if before in weights and after not in weights:
                weights[after] = weights.pop(before)


def fill(student: Student, weights: Weights, layout: Layout, folder: ModelFolder) -> None:
    """Put every weight into its place.

    Raises:
        ArtifactError: naming what is missing, too much, or of another shape.
    """
    state = student.state_dict()
    own = {"pixel_mean", "pixel_std"}  # the config's
    places = {name: source_of(name, layout) for name in state if name not in own}
    if missing := [source for source in places.values() if source not in weights]:
        raise ArtifactError(f"{folder.name} lacks weights of the student, such as {missing[0]} ({len(missing)} in all)")
    for name, source in places.items():
        value, wanted = weights.pop(source), state[name].shape
        if name == "logit_scale":
            value = value.reshape(-1)
        if value.shape != wanted:
            raise ArtifactError(f"{folder.name}: its weight {source} is {list(value.shape)}, expected {list(wanted)}")
        state[name].copy_(value)
    left = [name for name in weights if not re.match(layout.unused, name)]
    if named := [name for name in left if re.match(layout.left_out, name)]:
        logger.info("%s: of its weights are left out: %s", folder.name, listed(named))
    if extra := sorted(set(left) - set(named)):
        raise ArtifactError(
            f"{folder.name} holds weights that the student does not have, such as {extra[0]} ({len(extra)} in all)"
        )


def source_of(name: str, layout: Layout) -> str:
    """What a weight of our student is called in a layout.

    >>> source_of("adaptor.blocks.3.expand.bias", LAYOUTS[2]), source_of("tower.timm_model.norm.bias", LAYOUTS[2])
    ('text.text_adaptor.3.fn.0.bias', 'visual.norm.bias')
    """
    first, _, rest = name.partition(".")
    if first == "adaptor":
        part, _, kind = rest.rpartition(".")
        tops = {"norm": str(BLOCKS), "projection": str(BLOCKS + 1)}
        if part in tops:
            return f"{layout.adaptor}{tops[part]}.{kind}"
        _, number, inner = part.split(".")
        return f"{layout.adaptor}{number}.{PARTS[inner]}.{kind}"
    if first == "tower":
        return layout.tower + layout.name(re.sub(r"^(timm_model|vision_model)\.", "", rest))
    return f"{layout.projection}.{rest}" if first == "visual_projection" else name


def _openai(weights: Weights, folder: ModelFolder) -> dict[str, Any]:
    """Of CLIP's own tower, whose sizes `config.json` says."""
    from transformers import CLIPVisionConfig

    config: Any = CLIPVisionConfig.from_dict(dict(folder.config.get("vision_config") or {}))
    return _settings(config, config.hidden_size, config.image_size)


def _eva02(weights: Weights, folder: ModelFolder) -> dict[str, Any]:
    """Of timm's EVA02 for CLIP; the sizes are those of the weights."""
    for name in list(weights):  # files of the upstream code hold them beside the layers
        weights[re.sub(r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias", name)] = weights.pop(name)
    positions = needed(weights, "visual.pos_embed", folder)
    patch = needed(weights, "visual.patch_embed.proj.weight", folder).shape[-1]
    width, side = positions.shape[-1], math.isqrt(positions.shape[-2] - 1) * patch
    plain = {(768, 16, 224): "eva02_base_patch16_clip_224", (1024, 14, 336): "eva02_large_patch14_clip_336"}
    config = _timm_config(
        folder,
        architecture=plain.get((width, patch, side), "eva02_large_patch14_clip_224"),
        img_size=side,
        patch_size=patch,
        embed_dim=width,
        depth=_depth(weights, "visual."),
        num_heads=max(1, width // EVA_HEAD),
    )
    return {**_settings(config, width, side), "projection_bias": "visual.head.bias" in weights}


def _siglip2(weights: Weights, folder: ModelFolder) -> dict[str, Any]:
    """Of timm's SigLIP, whose pooled vectors are those of the shared space; the sizes are those of the weights."""
    trunk = "visual.trunk."
    positions = needed(weights, f"{trunk}pos_embed", folder)
    patch = needed(weights, f"{trunk}patch_embed.proj.weight", folder).shape[-1]
    hidden = needed(weights, f"{trunk}blocks.0.mlp.fc1.weight", folder).shape[0]
    width, side = positions.shape[-1], math.isqrt(positions.shape[-2]) * patch
    config = _timm_config(
        folder,
        architecture="vit_so400m_patch14_siglip_224",
        img_size=side,
        patch_size=patch,
        embed_dim=width,
        depth=_depth(weights, trunk),
        num_heads=max(1, width // (EVA_HEAD if width % SIGLIP_HEAD else SIGLIP_HEAD)),
        mlp_ratio=hidden / width,
    )
    return {**_settings(config, width, side), "projection": "none", "adaptor_norm": False}


def _settings(vision_config: Any, width: int, image_size: int) -> dict[str, Any]:
    return {
        "vision_config": vision_config,
        "tower_dim": width,
        "image_size": image_size,
        "pooling": default_pooling(vision_config),
    }


def _timm_config(folder: ModelFolder, *, architecture: str, **sizes: Any) -> Any:
    """The config of a timm tower.

    Raises:
        UsageError: if timm is not installed.
    """
    from transformers import TimmWrapperConfig

    try:
        import timm  # noqa: F401
    except ImportError:
        raise UsageError(f"the tower of {folder.name} is one of timm's: pip install 'llm2clip[timm]'") from None
    return TimmWrapperConfig(architecture=architecture, model_args=sizes)


def _depth(weights: Weights, prefix: str) -> int:
    numbers = (re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name) for name in weights)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def _eva_name(name: str) -> str:
    """Their name of a weight of timm's EVA02."""
    for timms, theirs in EVA_NAMES.items():
        name = name.replace(f".{timms}.", f".{theirs}.")
    return name


def _transform(folder: ModelFolder, image_size: int) -> ImageTransform:
    """As CLIP prepares its images, at the student's size; or as the folder says."""
    if not (folder.path / "preprocessor_config.json").exists():
        return ImageTransform(image_size=(image_size, image_size), resize=image_size)
    found = ImageTransform.from_pretrained(folder.path, name=folder.name)
    return found if found.image_size == (image_size, image_size) else found.at_size(image_size)


LAYOUTS = (
    Layout("vision_model.", "text_adapter.adaptor.", _openai, unused=r"vision_model\.embeddings\.position_ids$"),
    Layout("visual.trunk.", "text.text_proj.text_adaptor.", _siglip2, projection=None, left_out=r"text\.text\."),
    Layout(
        "visual.",
        "text.text_adaptor.",
        _eva02,
        name=_eva_name,
        projection="visual.head",
        unused=r"visual\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)$",
    ),
)
"""In transformers' format with CLIP's tower; of the authors' training code, with SigLIP2 and with EVA02."""
