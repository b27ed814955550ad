"""convert: a student that the paper's authors released, written as train-student leaves its own."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from llm2clip.artifacts import MANIFEST, is_complete, open_output, read_json, say_complete, write_manifest
from llm2clip.errors import UsageError, setting
from llm2clip.export.config import ConvertConfig
from llm2clip.hub import find_model
from llm2clip.opening import check_unchanged, open_student, origin_of
from llm2clip.student.checkpoint import tensors_fingerprint

logger = logging.getLogger("llm2clip")


def convert(config: ConvertConfig) -> Path:
    """Write the folder that `config` describes and return it.

    Raises:
        UsageError: for a model that is no released student.
        ArtifactError: for one whose weights are not what they should be.

    Example:
        >>> convert(ConvertConfig(model="microsoft/LLM2CLIP-Openai-B-16", out="student"))     # doctest: +SKIP
    """
    out = Path(config.out)
    with open_output(out, "student", config=config.settings()):
        if is_complete(out):
            check_unchanged(out, config.model, read_json(out / MANIFEST).get("fingerprint"))
            say_complete(out)
            return out
        folder = find_model(config.model, revision=config.model_revision)
        if folder.kind != "released":
            raise UsageError(
                f"{setting('model')} {config.model} is no student that the paper's authors released; one of llm2clip's "
                "own is written for others by llm2clip export"
            )
        student, transform = open_student(folder, device=torch.device("cpu"))
        student.save_pretrained(out)
        transform.save(out)
        origin = origin_of(folder.manifest, folder)
        write_manifest(
            out,
            "student",
            config=config.settings(),
            fingerprint=tensors_fingerprint(student.state_dict()),
            teacher_dim=student.config.teacher_dim,
            projection_dim=student.config.projection_dim,
            image_size=student.config.image_size,
            **origin,
        )
        logger.info("%s: its teacher is %s", out, origin.get("teacher", "not public"))
    return out
