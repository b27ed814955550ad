"""From a name to the folder of a text model, and one line for whatever is none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llm2clip import hub
from llm2clip.errors import UsageError
from llm2clip.hub import ModelFolder, find_model, missing_weights, quiet_transformers

VISION_HINTS = ("vision", "vit", "dino", "siglip", "clip", "eva", "swin", "convnext", "resnet", "timm")
LLM2VEC_CLASS = re.compile(r"(Llama|Mistral|Gemma|Qwen2)(Bi\w*|Encoder)Model")
"""LLM2Vec's two-way classes: the plain model of transformers, same weights, without the causal mask."""


def find_text_model(name: str | Path | ModelFolder, *, revision: str | None = None) -> ModelFolder:
    """The folder of a text model, downloaded for a Hub id.

    Raises:
        UsageError: saying what it holds instead.
        ArtifactError: if it is a teacher that is not finished.
    """
    folder = find_model(name, revision=revision)
    if folder.made not in ("teacher", ""):
        raise UsageError(
            f"{folder.name} is no teacher (found: {folder.made}); give the folder that train-teacher made, or an LLM"
        )
    if folder.kind == "transformers":
        kind = str(folder.config.get("model_type", ""))
        architectures = " ".join(folder.config.get("architectures") or [])
        if any(hint in (kind + architectures).lower() for hint in VISION_HINTS) and "vocab_size" not in folder.config:
            raise UsageError(
                f"{folder.name} is a vision model ({kind or architectures}), not a language model; give an LLM"
            )
        if not kind:
            raise UsageError(f"{folder.name} is no transformers model: its config.json has no model_type")
    return folder


def is_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a decoder LLM, which attends causally unless told otherwise."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    architectures = " ".join(config.get("architectures") or [])
    if "CausalLM" in architectures or "LMHead" in architectures:
        return True
    kind = config.get("model_type", "")
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_from_llm2vec(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` names a two-way class of LLM2Vec, as those of the released LLM2CLIP teachers do.

    Their code was written for transformers 4.40 to 4.46 and is not needed: with `is_causal` off, the plain model is
    the same.
    """
    named = [*(config.get("architectures") or []), *map(str, (config.get("auto_map") or {}).values())]
    return any(LLM2VEC_CLASS.fullmatch(name.rsplit(".", 1)[-1]) for name in named)


@contextlib.contextmanager
def one_line_errors(name: str | Path) -> Iterator[None]:
    """Around loading a model from `name`: what that raises is one line; loading itself is kept quiet.

    Transformers would report the LLM's output layer as an unexpected weight, each time.

    Raises:
        UsageError: if the model cannot be loaded.
    """
    with hub.one_line_errors(f"{name} cannot be loaded as a text model"), quiet_transformers():
        yield


def check_weights(model: torch.nn.Module, folder: ModelFolder) -> None:
    """Raise if the files of a model lack some of its weights, which transformers then draws at random.

    Raises:
        UsageError: naming one.
    """
    with one_line_errors(folder.name):
        missing = missing_weights(model, folder.path)
    if missing:
        raise UsageError(
            f"{folder.name} lacks weights of its model, such as {missing[0]} ({len(missing)} in all); get its files "
            "again"
        )
