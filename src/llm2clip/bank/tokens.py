"""Captions as token ids, without padding, and the order in which they are encoded: batches of near-equal length."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

TOKENISE_AT_ONCE = 1024
"""Captions handed to the tokenizer at once; its Python lists are many times the size of the ids."""
UNPADDED = {"text": {"padding": False, "return_attention_mask": False}, "common": {"return_tensors": None}}
MOST_PADDING = 1 / 8
LEAST_BATCH = 4
CHARACTERS_PER_TOKEN = 4
"""Used to size batches of models that tokenise in their own way."""


@dataclass(frozen=True)
class TokenBlock:
    """Texts as tokens: `[N]` texts one after another in flat arrays.

    Attributes:
        arrays: "input_ids" and whatever else the tokenizer gives a token, each `[sum of lengths]`.
        start: `[N + 1]`, where each text begins.
        prompt_length: leading tokens that belong to the prompt, or None.
    """

    arrays: dict[str, NDArray[np.int32]]
    start: NDArray[np.int64]
    prompt_length: int | None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text `[N]`, prompt and special tokens included."""
        return np.diff(self.start)


def can_tokenise_ahead(teacher: SentenceTransformer) -> bool:
    """Whether the teacher is an ordinary transformer over one fast tokenizer's ids."""
    first: Any = teacher[0]
    if not isinstance(first, Transformer) or "text" not in first.modalities:
        return False
    return getattr(first.tokenizer, "is_fast", False) and first.query_expansion is None


def tokenise(teacher: SentenceTransformer, texts: list[str], prompt: str | None) -> TokenBlock | None:
    """The tokens of `texts` as the teacher itself would cut and frame them; None if it gives anything else than tokens.

    The teacher's own `preprocess` does it, told not to pad.
    """
    preprocess: Any = teacher[0].preprocess
    arrays: dict[str, list[NDArray[np.int32]]] = {}
    lengths: list[int] = []
    prompt_length = None
    for first in range(0, len(texts), TOKENISE_AT_ONCE):
        part = texts[first : first + TOKENISE_AT_ONCE]
        features = dict(preprocess(part, prompt=prompt, processing_kwargs=UNPADDED))
        features.pop("modality", None)
        features.pop("attention_mask", None)
        prompt_length = features.pop("prompt_length", None)
        if "input_ids" not in features:
            return None
        sizes = [len(ids) for ids in features["input_ids"]]
        for name, values in features.items():
            if not isinstance(values, list) or [len(value) for value in values] != sizes:
                return None
            flat = np.fromiter(chain.from_iterable(values), np.int32, sum(sizes))
            arrays.setdefault(name, []).append(flat)
        lengths += sizes
    start = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenBlock({name: np.concatenate(parts) for name, parts in arrays.items()}, start, prompt_length)


def plan_batches(lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Which texts are encoded together: longest first, as many as `budget` tokens hold, padding included.

    A batch ends sooner, though not below a quarter of the budget, before a text that would be padding by an eighth.

    >>> [batch.tolist() for batch in plan_batches(np.array([3, 9, 4, 10, 3]), 20)]
    [[3, 1], [2], [0, 4]]
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    falling = -lengths[order]
    batches = []
    first = 0
    while first < len(order):
        longest = max(1, -int(falling[first]))
        alike = int(np.searchsorted(falling, -longest * (1 - MOST_PADDING), side="right")) - first
        count = max(1, min(budget // longest, max(alike, budget // (LEAST_BATCH * longest))))
        batches.append(order[first : first + count])
        first += count
    return batches


def pad(block: TokenBlock, texts: NDArray[np.int64], tokenizer: Any) -> dict[str, NDArray[np.int64]]:
    """The tokens of some texts as arrays `[n, longest]`, on the side and with the tokens that `tokenizer` pads with."""
    lengths = block.lengths[texts]
    longest = int(lengths.max())
    positions = np.arange(longest)
    left = tokenizer.padding_side == "left"
    mask = positions >= longest - lengths[:, None] if left else positions < lengths[:, None]
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    padded = {"attention_mask": mask.astype(np.int64)}
    for name, flat in block.arrays.items():
        padded[name] = np.full(mask.shape, fill.get(name, 0), np.int64)
        parts = [flat[block.start[text] : block.start[text + 1]] for text in texts]
        padded[name][mask] = np.concatenate(parts)
    return padded
