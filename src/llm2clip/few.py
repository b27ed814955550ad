"""Few images: what a training takes where its length, batch and rates are left open, and why.

The paper's settings are for millions of pairs: on a few hundred they come to a handful of steps at rates that need
thousands. What is here was found on the miniature's scenes with 300 to 4,000 images (docs/few-images.md).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llm2clip.errors import setting

logger = logging.getLogger("llm2clip")
FEW_IMAGES = 5000
"""Below so many images these are the defaults."""
TEACHER_STEPS = 100
LORA_RATE, HIGHEST_LORA_RATE, LORA_WIDTH = 2e-4, 2e-3, 4096
"""The paper's rate, for an LLM of the paper's width; as much higher as the LLM is narrower, up to the miniature's."""
STUDENT_STEPS, STUDENT_BATCH = 160, 128


def lora_rate(width: int) -> float:
    """The rate of adapters in an LLM of this width: a narrow one's weights need larger steps.

    >>> lora_rate(4096), lora_rate(1024), lora_rate(192)
    (0.0002, 0.0008, 0.002)
    """
    return min(HIGHEST_LORA_RATE, LORA_RATE * LORA_WIDTH / width)


def settle(config: Any, chosen: Mapping[str, Any], *, images: int, main: bool = True) -> dict[str, Any]:
    """Those of the `chosen` settings that `config` leaves open, told in one line with their reason.

    They belong together: with a length of the run's own none of them is chosen, and a line says which to give.

    >>> from types import SimpleNamespace
    >>> settle(SimpleNamespace(steps=None, epochs=None, batch_size=9), {"steps": 100, "batch_size": 64}, images=300)
    {'steps': 100}
    >>> settle(SimpleNamespace(steps=None, epochs=3, batch_size=None), {"steps": 100, "batch_size": 64}, images=300)
    {}
    """
    length = next((name for name in ("steps", "epochs") if getattr(config, name) is not None), None)
    found = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    settings = ", ".join(setting(name, value) for name, value in found.items() if length is None or name != "steps")
    if settings and main:
        told = f"beside {setting(length)} also give {settings}" if length else f"{settings}, unless told otherwise"
        logger.info("%s images are few: %s (docs/few-images.md)", f"{images:,}", told)
    return found if length is None else {}
