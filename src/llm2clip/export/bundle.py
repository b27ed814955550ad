"""One SentenceTransformer folder for texts and pictures: a Router over the teacher with the adaptor, and the tower."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from llm2clip.artifacts import read_json, write_json
from llm2clip.errors import UsageError, setting
from llm2clip.export.adaptor_module import AdaptorModule
from llm2clip.export.tower import load_options, save_tower
from llm2clip.hub import STUDENT_CONFIG
from llm2clip.opening import bundle_parts
from llm2clip.pipeline import LLM2CLIP
from llm2clip.teacher.joined_module import Joined


def save_bundle(model: LLM2CLIP, folder: Path) -> None:
    """Write a student and its teacher as one SentenceTransformer folder.

    Raises:
        UsageError: if the teacher has modules that come with code of their own.
    """
    assert model.teacher is not None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tower-") as tower:
        save_tower(model, Path(tower))
        legs = {"text": text_leg(model), "image": image_leg(model, Path(tower))}
        router = Router(
            legs,  # type: ignore[arg-type]
            default_route="text",
            route_mappings={(None, "text"): "text", (None, "image"): "image"},
        )
        prompts, default = prompts_of(model)
        bundle = SentenceTransformer(modules=[router], prompts=prompts, default_prompt_name=default, device="cpu")
        bundle.save_pretrained(str(folder), create_model_card=False)
    keep_load_options(folder, load_options(type(model.student.tower), model.student.config.pooling))
    write_json(folder / STUDENT_CONFIG, json.loads(model.student.config.to_json_string(use_diff=False)))


def keep_load_options(folder: Path, options: dict[str, bool]) -> None:
    """Note beside the tower what loading it needs; sentence-transformers reads but does not write such options."""
    if options:
        file = folder / bundle_parts(folder)["tower"] / "sentence_bert_config.json"
        write_json(file, {**read_json(file), "model_kwargs": options})


def text_leg(model: LLM2CLIP) -> list[torch.nn.Module]:
    """The teacher's own modules, the adaptor, unit length."""
    assert model.teacher is not None
    modules = list(model.teacher.children())
    for module in modules:
        if not isinstance(module, Joined) and not type(module).__module__.startswith("sentence_transformers."):
            raise UsageError(
                f"the teacher's module {type(module).__name__} comes with code of its own, which one folder cannot "
                f"hold; use {setting('to', 'transformers')} and keep the teacher beside it"
            )
    config = model.student.config
    adaptor = AdaptorModule(config.teacher_dim, config.projection_dim, config.adaptor_blocks)
    adaptor.adaptor.load_state_dict(model.student.adaptor.state_dict())
    return [*modules, adaptor, Normalize()]


def image_leg(model: LLM2CLIP, tower: Path) -> list[torch.nn.Module]:
    """The tower in `tower`, read off as the student does, its projection, unit length."""
    config = model.student.config
    output, pooling = read_off(model)
    # Named: left to itself it would pool the first token, also for families that pool otherwise.
    transformer = Transformer(
        str(tower),
        model_kwargs=dict(load_options(type(model.student.tower), config.pooling)),
        modality_config={"image": {"method": "forward", "method_output_name": output}},
        module_output_name="token_embeddings" if pooling else "sentence_embedding",
    )
    projection = Dense(
        config.tower_dim,
        config.projection_dim,
        bias=False,
        activation_function=torch.nn.Identity(),
        init_weight=model.student.visual_projection.weight.detach().cpu().clone(),
    )
    pool = [Pooling(config.tower_dim, pooling_mode=pooling)] if pooling else []
    return [transformer, *pool, projection, Normalize()]


def read_off(model: LLM2CLIP) -> tuple[str, Any]:
    """The tower's output that holds the picture's vector, and how its tokens are pooled; None if it is one vector."""
    pooling = model.student.config.pooling
    if pooling != "pooler":
        return "last_hidden_state", pooling
    height, width = model.transform.image_size
    with torch.inference_mode():
        blank = torch.zeros(1, 3, height, width, dtype=model.student.dtype, device=model.device)
        pooled = model.student.tower(pixel_values=blank).pooler_output
    # Some convolutional towers pool to a 1 x 1 map, which sentence-transformers takes for a sequence of one token.
    return "pooler_output", "mean" if pooled.ndim == 4 else None


def prompts_of(model: LLM2CLIP) -> tuple[dict[str, str] | None, str | None]:
    """The prompts of the folder and the name of the one put before every text."""
    teacher: Any = model.teacher
    if model.prompt:
        return {"caption": model.prompt}, "caption"
    # "" is the bank's word for none, whatever the teacher's own default
    return teacher.prompts or None, teacher.default_prompt_name if model.prompt is None else None
