"""The vision tower by itself, as a checkpoint of its own family (CLIPVisionModel, Dinov2Model, ...)."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llm2clip.errors import LLM2CLIPError
from llm2clip.export.check import probe_pictures
from llm2clip.hub import cast
from llm2clip.pipeline import LLM2CLIP
from llm2clip.student.tower import pooled_output


def save_tower(model: LLM2CLIP, folder: Path) -> None:
    """Write the tower's weights and config, and how its pictures are prepared."""
    tower: Any = model.student.tower
    tower.save_pretrained(folder)
    model.transform.save(folder)


def tower_vectors(model: LLM2CLIP) -> np.ndarray:
    """The tower's own picture vectors [4, W] of the probes, before any projection."""
    pixels = torch.stack([model.transform(picture) for picture in probe_pictures()]).to(model.device)
    student = model.student
    with torch.inference_mode():
        normalised = (pixels - student.pixel_mean) / student.pixel_std
        pooled = pooled_output(student.tower, normalised.to(student.dtype), pooling=student.config.pooling)
    return pooled.float().cpu().numpy()


def reloaded_tower_vectors(folder: Path, *, pooling: str, device: torch.device) -> np.ndarray:
    """The same from a saved tower, loaded by the class its config names, with the image processor beside it.

    Raises:
        LLM2CLIPError: if transformers has no such class.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    tower_class = getattr(transformers, name, None)
    if tower_class is None:
        raise LLM2CLIPError(f"{folder}: transformers {transformers.__version__} has no class {name!r}")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tower = cast(tower_class.from_pretrained(folder, **load_options(tower_class, pooling)), device).eval()
    pixels = torch.cat([processor(images=p, return_tensors="pt")["pixel_values"] for p in probe_pictures()])
    with torch.inference_mode():
        pooled = pooled_output(tower, pixels.to(device, tower.dtype), pooling=pooling)
    return pooled.float().cpu().numpy()


def load_options(tower_class: Any, pooling: str) -> dict[str, bool]:
    """What `from_pretrained` needs, so that there is a pooler if it is read, and none made up at random if not."""
    option = inspect.signature(tower_class.__init__).parameters.get("add_pooling_layer")
    wanted = pooling == "pooler"
    return {} if option is None or option.default is wanted else {"add_pooling_layer": wanted}
