"""The models that the settings of `evaluate` name, opened: the one that is scored, and those it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip.errors import LLM2CLIPError, UsageError, one_line, setting
from llm2clip.eval.cache import model_digest
from llm2clip.eval.config import NO_BASELINE, EvaluateConfig
from llm2clip.eval.encoders import SentenceTransformerEncoder
from llm2clip.eval.foreign import is_foreign, open_foreign
from llm2clip.hub import DTYPES, ModelFolder, find_model, pick_device
from llm2clip.on_hub import cached_folder
from llm2clip.opening import check_images_fit, check_unchanged
from llm2clip.pipeline import LLM2CLIP, Teacher
from llm2clip.protocols import TextEncoder
from llm2clip.two_towers import ClipEncoder


def open_encoder(config: EvaluateConfig) -> tuple[TextEncoder, dict[str, Any]]:
    """The encoder that the settings name, and what the report says of it.

    Raises:
        UsageError: if there is none, or a student comes without its teacher.
    """
    options = options_of(config)
    if config.model is None:
        assert config.teacher is not None
        teacher = Teacher.from_pretrained(config.teacher, revision=config.teacher_revision, **options)
        teacher.warns = False
        return teacher, {"encoder": "text encoder", "dim": teacher.dim, "teacher_fingerprint": teacher.fingerprint}
    if is_foreign(config.model):
        for field, why in (("teacher", "encodes texts itself"), ("model_revision", "is no Hub id with revisions")):
            if (value := getattr(config, field)) is not None:
                raise UsageError(f"{setting('model')} {config.model} {why}; leave {setting(field)} {value} out")
        foreign = open_foreign(config.model, **options)
        digest = model_digest([(config.model, None)], "")
        return foreign, {"encoder": type(foreign.model).__name__, "fingerprint": digest}
    folder = find_model(config.model, revision=config.model_revision)
    if folder.kind in ("student", "bundle", "released"):
        model = LLM2CLIP.from_pretrained(folder, config.teacher, teacher_revision=config.teacher_revision, **options)
        if model.teacher is None:
            wanted = model.origin.get("teacher_fingerprint", "unknown")
            raise UsageError(
                f"{setting('model')} {config.model} reads the vectors of its teacher (fingerprint {wanted}); add "
                f"{setting('teacher', 'DIR')}"
            )
        model.warns = False
        return model, {"encoder": "llm2clip", "dim": model.dim, **model.origin}
    if config.teacher is not None:
        raise UsageError(
            f"{setting('model')} {config.model} encodes texts itself; leave {setting('teacher')} {config.teacher} out"
        )
    encoder = open_other(folder, options)
    return encoder, {"encoder": type(encoder.model).__name__}


def options_of(config: EvaluateConfig) -> dict[str, Any]:
    """How models are loaded."""
    return {
        "device": pick_device(config.device),
        "dtype": DTYPES.get(config.precision),  # auto: as saved, if the device computes in it
        "trust_remote_code": config.trust_remote_code,
    }


def open_other(folder: ModelFolder, options: Mapping[str, Any]) -> ClipEncoder | SentenceTransformerEncoder:
    """Another's model that encodes images and texts."""
    check_images_fit(folder)
    loader = SentenceTransformerEncoder if folder.kind == "sentence-transformers" else ClipEncoder
    return loader.from_pretrained(folder, **options)


def open_baseline(config: EvaluateConfig, facts: Mapping[str, Any]) -> tuple[TextEncoder | None, dict[str, Any]]:
    """What the model is compared with, and its name; or nothing, and in words why.

    Args:
        facts: what is known of the model that is scored.

    Raises:
        UsageError: if the baseline that was asked for cannot be one.
    """
    options = options_of(config)
    if config.baseline == NO_BASELINE or (config.baseline is None and facts.get("encoder") != "llm2clip"):
        return None, {}
    if config.baseline is None:
        try:
            folder = plain_tower(facts.get("tower"), revision=facts.get("tower_revision"))
            options["trust_remote_code"] = False  # which was said of other models
            return open_other(folder, options), {"model": folder.name}
        except LLM2CLIPError as error:
            return None, {"why": one_line(error)}
    return open_beside("baseline", config.baseline, config), {"model": config.baseline}


def open_beside(field: str, name: str, config: EvaluateConfig) -> TextEncoder:
    """A model that another is compared with: it needs no teacher beside it.

    Args:
        field: the setting that names it.

    Raises:
        UsageError: if it cannot be one.
    """
    options = options_of(config)
    found: Any
    if config.model is None:
        found = Teacher.from_pretrained(name, **options)
    elif is_foreign(name):
        return open_foreign(name, **options)
    elif (folder := find_model(name)).kind == "student":
        raise UsageError(
            f"{setting(field)} {name} needs its teacher beside it; export it to sentence-transformers, and give that "
            "folder"
        )
    elif folder.kind not in ("bundle", "released"):
        return open_other(folder, options)
    else:
        found = LLM2CLIP.from_pretrained(folder, **options)
    found.warns = False
    return found


def plain_tower(name: str | None, *, revision: str | None) -> ModelFolder:
    """The model whose vision half a student's tower was, with its text half; nothing is downloaded.

    Raises:
        UsageError: if it is not here, or has no text half.
    """
    if name is None:
        raise UsageError("the model does not say which tower it was trained from")
    here = Path(name) if Path(name).is_dir() else cached_folder(name, revision)
    if here is None:
        raise UsageError(f"the tower it was trained from, {name}, is not on this machine")
    folder = dataclasses.replace(find_model(here), name=name)
    if not {"text_config", "vision_config"} <= set(folder.config):
        raise UsageError(f"the tower it was trained from, {name}, has no text half")
    return folder


def check_same_model(done: Mapping[str, Any], config: EvaluateConfig) -> None:
    """Check that a finished report is of the model that is there now.

    Raises:
        UsageError: naming both fingerprints.
    """
    out = Path(config.out or "")
    if config.model is not None and is_foreign(config.model):
        before, now = done["model"].get("fingerprint"), model_digest([(config.model, None)], "")
        if before not in (None, now):
            raise UsageError(
                f"{setting('out')} {out} was made of {config.model} when it had fingerprint {before}; it has {now} "
                f"now: name a new folder or delete {out}"
            )
    elif config.model is not None:
        check_unchanged(out, config.model, done["model"].get("fingerprint"))
    elif config.teacher is not None:
        check_unchanged(out, config.teacher, done["model"].get("teacher_fingerprint"))
