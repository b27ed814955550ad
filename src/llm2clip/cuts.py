"""Captions longer than a text encoder reads: which they are, and one line that says how many."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("llm2clip")
AT_ONCE = 1024
"""Captions tokenised at once."""
SPECIAL_TOKENS = 8
"""At most so many are put around a caption; besides, a token is a byte at least."""
NO_LIMIT = 1_000_000
"""Tokenizers without a limit name a huge one."""


class CutCounter:
    """Tells which captions `teacher` reads only the beginning of.

    Args:
        prompt: put before every caption; counts with it.

    Example:
        >>> counter = CutCounter(teacher)                                               # doctest: +SKIP
        >>> counter.limit, counter.cut(["a red disc", "a disc " * 500]).tolist()        # doctest: +SKIP
        (512, [False, True])
    """

    def __init__(self, teacher: SentenceTransformer, prompt: str | None = None) -> None:
        self.prompt = prompt or ""
        # Copies: a tokenizer is told for each call whether to cut, and other threads use the teacher's own.
        self._tokenizers = [(copy.deepcopy(tokenizer), limit) for tokenizer, limit in _readers(teacher)]

    @property
    def limit(self) -> int | None:
        """Tokens read of a caption, prompt and special tokens included; None if all are, or it cannot be told."""
        return min((limit for _, limit in self._tokenizers), default=None)

    def cut(self, texts: Sequence[str], lengths: NDArray[np.int64] | None = None) -> NDArray[np.bool_]:
        """Whether each of `texts` is longer than what is read of it `[N]`.

        Args:
            lengths: tokens read of each, if known: those of fewer than the limit need no second look.
        """
        found = np.zeros(len(texts), bool)
        for tokenizer, limit in self._tokenizers:
            if lengths is not None:
                candidates = np.flatnonzero(lengths >= limit)
            else:
                room = limit - SPECIAL_TOKENS - len(self.prompt.encode())
                candidates = np.flatnonzero([len(text.encode(errors="replace")) > room for text in texts])
            for first in range(0, len(candidates), AT_ONCE):
                part = candidates[first : first + AT_ONCE]
                whole = tokenizer([self.prompt + texts[i] for i in part], truncation=False, verbose=False)["input_ids"]
                found[part] |= [len(ids) > limit for ids in whole]
        return found


def say_cut(num_cut: int, total: int, limit: int | None, *, what: str = "captions") -> None:
    """Warn that captions were cut, if any were."""
    if num_cut and limit is not None:
        logger.warning(
            "%s of %s %s (%s) are longer than %s tokens: their ends are cut "
            "(a joined teacher cuts for the member that reads least)",
            f"{num_cut:,}",
            f"{total:,}",
            what,
            f"{num_cut / total:.1%}",
            f"{limit:,}",
        )


def _readers(teacher: SentenceTransformer) -> list[tuple[Any, int]]:
    """The tokenizers through which a caption goes, and the tokens each lets through."""
    from sentence_transformers.base.modules import Router

    first: Any = teacher[0]
    modules: list[Any] = [first]
    if isinstance(first, Router):
        routes: Any = first.sub_modules
        every = hasattr(first, "members")  # of a joined teacher; else captions go one way
        ways = [name for name in routes if every or name == (first.default_route or "document")]
        modules = [routes[name][0] for name in ways]
    return [
        (module.tokenizer, module.max_seq_length)
        for module in modules
        if "text" in getattr(module, "modalities", [])
        and callable(getattr(module, "tokenizer", None))
        and (getattr(module, "max_seq_length", None) or NO_LIMIT) < NO_LIMIT
    ]
