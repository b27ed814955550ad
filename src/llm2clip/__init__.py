"""llm2clip: a large language model teaches CLIP.

Public names are imported on first use, so that `import llm2clip` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "LLM2CLIP": "llm2clip.pipeline",
    "Bank": "llm2clip.bank.reader",
    "BankConfig": "llm2clip.bank.config",
    "build_bank": "llm2clip.bank.build",
    "BadImage": "llm2clip.data.bad",
    "SourceConfig": "llm2clip.data.config",
    "load_image": "llm2clip.data.images",
    "open_source": "llm2clip.data.source",
    "EvaluateConfig": "llm2clip.eval.config",
    "evaluate": "llm2clip.eval.run",
    "ExportConfig": "llm2clip.export.config",
    "export_model": "llm2clip.export.run",
    "Adaptor": "llm2clip.student.adaptor",
    "ImageTransform": "llm2clip.student.transform",
    "Student": "llm2clip.student.model",
    "StudentConfig": "llm2clip.student.config",
    "contrastive_loss": "llm2clip.student.loss",
    "start_student": "llm2clip.student.start",
    "train_student": "llm2clip.student.train",
    "JoinConfig": "llm2clip.teacher.config",
    "join_teachers": "llm2clip.teacher.join",
    "TeacherConfig": "llm2clip.teacher.config",
    "load_teacher": "llm2clip.teacher.model",
    "train_teacher": "llm2clip.teacher.train",
    "ArtifactError": "llm2clip.errors",
    "LLM2CLIPError": "llm2clip.errors",
    "SourceError": "llm2clip.errors",
    "TooManyBadSamples": "llm2clip.errors",
    "UsageError": "llm2clip.errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llm2clip' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
