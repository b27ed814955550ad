"""What the paper and its released code did: LoRA on captions, then a student with a random adaptor, all at one rate.

Stage 1: batches of 512 pairs, one pass. Stage 2: batches of 4,096, 4 passes, 1e-5 for tower and adaptor alike
(arXiv 2411.04997, section 6.2; the released code has 20 passes). It is for millions of pairs; our own defaults differ
in the adaptor's rate, and in what a tower with a text half inherits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.student.config import StudentConfig
from llm2clip.teacher.config import TeacherConfig


def teacher(data: tuple[str, ...], model: str, out: Path, **changes: Any) -> TeacherConfig:
    """Stage 1.

    >>> teacher(("captions.csv",), "meta-llama/Llama-3.1-8B-Instruct", Path("teacher")).batch_size
    512
    """
    given: dict[str, Any] = {"epochs": 1, "batch_size": 512, "learning_rate": 2e-4, "lora_rank": 16}
    return TeacherConfig(data=data, model=model, out=out, **given | changes)


def student(bank: tuple[str, ...], tower: str, out: Path, **changes: Any) -> StudentConfig:
    """Stage 2.

    >>> student(("bank",), "openai/clip-vit-large-patch14", Path("student"), epochs=20).adaptor_learning_rate
    1e-05
    """
    given: dict[str, Any] = {
        "inherit": "none",
        "epochs": 4,
        "batch_size": 4096,
        "adaptor_learning_rate": 1e-5,
        "dim": 1280,
    }
    return StudentConfig(bank=bank, tower=tower, out=out, **given | changes)
