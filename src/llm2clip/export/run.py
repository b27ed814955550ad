"""export: write a student for other programs, load it as they do, compare, and only then call it done."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import torch

from llm2clip.artifacts import MANIFEST, is_complete, open_output, read_json, say_complete, write_manifest
from llm2clip.errors import LLM2CLIPError, UsageError, setting, shortened
from llm2clip.export.card import llm_of, read_scores, write_card
from llm2clip.export.check import compare
from llm2clip.export.config import ExportConfig
from llm2clip.export.format import Format, Vectors, find_format
from llm2clip.hub import LOAD_ERRORS, cast, find_model, is_emulated, pick_device
from llm2clip.opening import check_unchanged
from llm2clip.pipeline import LLM2CLIP
from llm2clip.student.tower import load_options

logger = logging.getLogger("llm2clip")


def export_model(config: ExportConfig) -> Path:
    """Write the folder that `config` describes and return it.

    Raises:
        UsageError: for a model that is no student, or a teacher that is not its own.
        LLM2CLIPError: if what was written does not load elsewhere or gives other vectors.

    Example:
        >>> settings = ExportConfig(model="student", teacher="teacher", to="sentence-transformers", out="bundle")
        >>> export_model(settings)                                                     # doctest: +SKIP
    """
    form = find_format(config.to)
    scores, protocol = (None, []) if config.report is None else read_scores(config.report)
    out = Path(config.out)
    with open_output(out, "export", config=config.settings()):
        if is_complete(out):
            check_unchanged(out, config.model, read_json(out / MANIFEST).get("fingerprint"))
            say_complete(out)
            return out
        device = pick_device(config.device)
        model = _open(config, device)
        trained = find_model(config.model, revision=config.model_revision).manifest.get("config", {})
        if config.to == "tower" and trained.get("unlocked_blocks") == 0 and not trained.get("lora_rank"):
            locked = setting("unlocked_blocks", 0)
            logger.warning("the tower did not learn (train-student %s): it is exported as it was before", locked)
        facts = facts_of(model, config)
        if form.needs_teacher and model.teacher is None:
            raise UsageError(f"the model has no teacher; add {setting('teacher', 'DIR')}")
        emulated = any(is_emulated(part, device) for part in model.parts)
        for part in model.parts:
            cast(part, device)  # where its precision would be emulated: to float32
        expected = form.expect(model)
        in_float32 = all(weight.dtype == torch.float32 for part in model.parts for weight in part.parameters())
        if emulated:  # what is written is what was saved
            del model
            model = _open(config, device)
        form.write(model, out)
        write_card(out, form, facts, scores=scores, protocol=protocol)
        del model  # its copy in the fresh process needs the room
        gc.collect()
        torch.cuda.empty_cache()  # what torch keeps of a GPU's memory for itself; nothing where there is none
        found = _reload(form, out, facts, device, in_float32)
        checked = compare(out, expected, found)
        logger.info("%s: loaded again and equal, least cosine %s", out, _listed(checked))
        write_manifest(out, "export", config=config.settings(), **facts, checked=_rounded(checked))
    return out


def _reload(form: Format, out: Path, facts: dict[str, Any], device: torch.device, in_float32: bool) -> Vectors:
    """The vectors that the written folder gives.

    Raises:
        LLM2CLIPError: in one line, whatever the library that opens it says.
    """
    try:
        return form.reload(out, facts, device, in_float32)
    except (*LOAD_ERRORS, AssertionError) as error:
        if isinstance(error, (LLM2CLIPError, torch.OutOfMemoryError)):
            raise
        raise LLM2CLIPError(f"{out} was written, and does not load again: {shortened(str(error))}") from error


def _open(config: ExportConfig, device: torch.device) -> LLM2CLIP:
    return LLM2CLIP.from_pretrained(
        config.model,
        config.teacher,
        device=device,
        dtype="auto",
        revision=config.model_revision,
        teacher_revision=config.teacher_revision,
        trust_remote_code=config.trust_remote_code,
    )


def facts_of(model: LLM2CLIP, config: ExportConfig) -> dict[str, Any]:
    """What the manifest and the card say of the model."""
    student = model.student.config
    return {
        "to": config.to,
        "dim": student.projection_dim,
        "teacher_dim": student.teacher_dim,
        "tower_dim": student.tower_dim,
        "tower_type": student.vision_config.model_type,
        "tower_class": type(model.student.tower).__name__,
        "pooling": student.pooling,
        "load_options": load_options(type(model.student.tower), student.pooling),
        "image_size": list(model.transform.image_size),
        "llm": llm_of(config.teacher),
        **model.origin,
    }


def _listed(checked: dict[str, float]) -> str:
    return ", ".join(f"{name} {cosine:.6f}" for name, cosine in checked.items())


def _rounded(checked: dict[str, float]) -> dict[str, float]:
    return {name: round(cosine, 5) for name, cosine in checked.items()}
