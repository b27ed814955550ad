"""Begin as the CLIP that the tower is half of, and keep what it knew while images and the LLM teach it more.

What train-student does by default with such a tower where it learns (few images lock it), written out. In the
miniature (docs/student.md), the mean of five retrieval columns 51.6 -> 58.5 with the images' own captions, 64.7 with
24,000 captions without images beside them (`--inherit-bank`), for four points of long captions. With images a third
more time a step at real size (counted).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.student.config import StudentConfig


def student(bank: tuple[str, ...], tower: str, out: Path, **changes: Any) -> StudentConfig:
    """Stage 2.

    >>> student(("bank",), "openai/clip-vit-large-patch14", Path("student"), inherit_bank=("words",)).keep
    1.0
    """
    given: dict[str, Any] = {"inherit": "auto", "inherit_noise": 0.2, "keep": 1.0, "keep_text": 4.0}
    return StudentConfig(bank=bank, tower=tower, out=out, **given | changes)
