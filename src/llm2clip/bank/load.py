"""The teacher, loaded for encoding: in the arithmetic asked for, with the best attention."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from llm2clip.compat import attention_of
from llm2clip.config import check_choice
from llm2clip.errors import UsageError, setting, shortened
from llm2clip.hub import DTYPES
from llm2clip.teacher.model import load_teacher, teacher_fingerprint

logger = logging.getLogger("llm2clip")
PROBES = ["a red disc, drawn on a plain dark background, sits near the bottom left corner", "two discs"]
SAME_COSINE = 0.98
"""Two attention backends that compute the same differ by rounding; a causal one instead of two-way by far more."""


@dataclass(frozen=True)
class TeacherFacts:
    """What decides a vector beside the caption itself, and where it came from; part of a bank's manifest.

    Attributes:
        name: folder or Hub id, as given.
        revision: branch, tag or commit of that id on the Hub, if one was given.
    """

    name: str
    fingerprint: str
    prompt: str
    precision: str
    dim: int
    revision: str | None = None


def load_for_encoding(
    name: str,
    *,
    revision: str | None = None,
    device: torch.device,
    precision: str,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """The teacher `name` in `precision` on `device`, with flash attention where it is installed and right."""
    dtype = DTYPES[precision]
    teacher = load_teacher(name, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for module in list(teacher)[1:]:  # a Dense layer is loaded in fp32 whatever was asked for
        module.to(dtype)
    if device.type == "cuda":
        use_flash_attention(teacher)
    return teacher


def use_flash_attention(teacher: SentenceTransformer) -> bool:
    """Switch to flash attention, which needs no padding; returns whether it is in use.

    It is left alone where flash-attn is not installed or does not support the model, and where the vectors of
    two test captions change: then it would not attend as the teacher was trained to.
    """
    first: Any = teacher[0]
    if importlib.util.find_spec("flash_attn") is None or not hasattr(first, "unpad_inputs"):
        return False
    before = torch.as_tensor(teacher.encode(PROBES, convert_to_tensor=True)).float()
    earlier = attention_of(first.model)
    try:
        first.model.set_attn_implementation("flash_attention_2")
        first.unpad_inputs = None  # looks again whether padding can be dropped
        after = torch.as_tensor(teacher.encode(PROBES, convert_to_tensor=True)).float()
        same = float(torch.cosine_similarity(before, after).min()) > SAME_COSINE
    except (ValueError, ImportError, RuntimeError, NotImplementedError) as error:
        logger.info("flash attention does not fit this teacher (%s)", shortened(str(error), most=200))
        same = False
    if not same:
        first.model.set_attn_implementation(earlier)
        first.unpad_inputs = None
        logger.info("encoding with %s attention and padded batches of near-equal length", earlier)
    return same


def resolve_prompt(teacher: SentenceTransformer, prompt: str | None, prompt_name: str | None) -> str:
    """The text put before every caption: `prompt`, the teacher's prompt of that name, or its default one.

    Raises:
        UsageError: if the teacher has no prompt of that name.
    """
    if prompt is not None:
        return prompt
    if prompt_name is not None:
        if not teacher.prompts:
            raise UsageError(
                f"{setting('prompt_name')} is {prompt_name!r}, but this teacher has no prompts; use "
                f"{setting('prompt', 'TEXT')}"
            )
        return teacher.prompts[check_choice(setting("prompt_name"), prompt_name, teacher.prompts)] or ""
    return teacher.prompts.get(teacher.default_prompt_name or "") or ""


def facts_of(
    teacher: SentenceTransformer, name: str, *, prompt: str, precision: str, dim: int, revision: str | None = None
) -> TeacherFacts:
    """What a bank's manifest says of its teacher."""
    return TeacherFacts(name, teacher_fingerprint(teacher), prompt, precision, dim, revision)
