"""Captions to vectors as fast as the teacher runs: no padding to speak of, nothing that waits for something else.

Three things happen at once: texts of the next shard are tokenised in another thread (`llm2clip.bank.fill`), the
teacher works on a batch, and the vectors of the batch before travel to the CPU.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import Tensor

from llm2clip.bank.dtypes import Stored, pack, read_dtype, unpack
from llm2clip.cuts import CutCounter
from llm2clip.errors import LLM2CLIPError, UsageError, setting, shortened

logger = logging.getLogger("llm2clip")
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens a batch: enough that the matrix products run at full speed; more leaves a CPU's cache, and on a GPU an 8B LLM
(16 GB) must leave room in 24 GB for the activations."""
IN_FLIGHT = 2
"""Batches whose vectors may still be on their way to the CPU."""
TOKENISE_AT_ONCE = 1024
"""Captions handed to the tokenizer at once; its Python lists are many times the size of the ids."""
UNPADDED = {"text": {"padding": False, "return_attention_mask": False}, "common": {"return_tensors": None}}
MOST_PADDING = 1 / 8
LEAST_BATCH = 4
CHARACTERS_PER_TOKEN = 4
"""Used to size batches of models that tokenise in their own way."""
Sink = Callable[[NDArray[np.int64], Stored], None]


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


@dataclass(frozen=True)
class Prepared:
    """Texts ready to be encoded: which go together, and their tokens, or the texts if the teacher tokenises itself.

    Attributes:
        lengths: of each text `[N]`, in tokens, or else in characters.
        num_cut: texts longer than the teacher reads.
    """

    batches: list[NDArray[np.int64]]
    lengths: NDArray[np.int64]
    tokens: TokenBlock | None
    texts: list[str]
    num_cut: int = 0


class CaptionEncoder:
    """A teacher that encodes captions by the shard.

    Args:
        prompt: put before every caption; "" for none.
        dtype: how vectors are to be stored (see `llm2clip.bank.dtypes`).
        batch_tokens: tokens at once; None for the device's default.
        compile: run the teacher through torch.compile.

    Example:
        >>> encoder = CaptionEncoder(teacher, dtype="float16")                          # doctest: +SKIP
        >>> vectors, tokens = encoder.encode(["a red disc", "a blue square"])           # doctest: +SKIP
    """

    def __init__(
        self,
        teacher: SentenceTransformer,
        *,
        prompt: str = "",
        dtype: str = "float16",
        batch_tokens: int | None = None,
        compile: bool = False,
    ) -> None:
        self.teacher, self.prompt, self.dtype = teacher.eval(), prompt or None, dtype
        self._first: Any = teacher[0]
        self.device = torch.device(teacher.device)
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        self.ahead = can_tokenise_ahead(teacher)
        self.first_position = take_over_flattening(teacher[0]) if self.ahead else None
        self.varlen = self.first_position is not None
        self.cuts = CutCounter(teacher, prompt)
        self.dim = int(self._forward(self._own_features(["a"])).shape[1])
        self._said_halved = False
        if compile:
            self._compile()

    def _compile(self) -> None:
        """Run the teacher through torch.compile from here on.

        Raises:
            UsageError: if this machine cannot, as one without a C++ compiler.
        """
        self._first.compile(dynamic=True)
        try:
            self._forward(self._own_features(["a", "b"]))
        except (RuntimeError, OSError) as error:
            detail = shortened(str(error), most=200)
            raise UsageError(f"{setting('compile')} does not work here ({detail}); leave it out") from error

    def prepare(self, texts: list[str]) -> Prepared:
        """Tokenise and plan batches; runs in another thread than `run`."""
        tokens = tokenise(self.teacher, texts, self.prompt) if self.ahead and texts else None
        if tokens is not None:
            num_cut = int(self.cuts.cut(texts, tokens.lengths).sum())
            return Prepared(plan_batches(tokens.lengths, self.batch_tokens), tokens.lengths, tokens, [], num_cut)
        lengths = np.array([len(text) + len(self.prompt or "") for text in texts], np.int64)
        batches = plan_batches(lengths, CHARACTERS_PER_TOKEN * self.batch_tokens)
        return Prepared(batches, lengths, None, texts, int(self.cuts.cut(texts).sum()))

    @torch.inference_mode()
    def run(self, prepared: Prepared, sink: Sink) -> NDArray[np.int32]:
        """Encode; `sink(places, (vectors [n, T], scales or None))` gets each batch as stored.

        Returns:
            Tokens of each text `[N]`; 0 where the teacher does not tell.

        Raises:
            LLM2CLIPError: if not even one caption fits the device's memory.
        """
        lengths = np.zeros(sum(len(batch) for batch in prepared.batches), np.int32)
        waiting: deque[tuple[NDArray[np.int64], Callable[[], Any]]] = deque()
        for batch in prepared.batches:
            for places, vectors, counts in self._encode_batch(prepared, batch):
                lengths[places] = counts
                waiting.append((places, self._to_cpu(*pack(vectors, self.dtype))))
                if len(waiting) >= IN_FLIGHT:
                    _deliver(waiting, sink)
        while waiting:
            _deliver(waiting, sink)
        return lengths

    def encode(self, texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Vectors `[N, T]` as a reader would get them from a bank, and tokens of each text `[N]`."""
        out = np.empty((len(texts), self.dim), read_dtype(self.dtype))

        def sink(places: NDArray[np.int64], stored: Stored) -> None:
            out[places] = unpack(*stored, self.dtype)

        return out, self.run(self.prepare(texts), sink)

    def _encode_batch(
        self, prepared: Prepared, places: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor, NDArray[np.int64]]]:
        """Places, vectors `[n, T]` and token counts `[n]` of a batch, in parts if the device's memory is too small."""
        features = self._features(prepared, places)
        counts = token_counts(features, len(places)) if prepared.tokens is None else prepared.tokens.lengths[places]
        try:
            vectors = self._forward(features)
        except torch.OutOfMemoryError:
            vectors = None
        if vectors is not None:
            yield places, vectors, counts
        elif len(places) == 1:
            raise LLM2CLIPError(
                f"one caption of {counts[0]} tokens does not fit into the memory of {self.device}; give "
                f"{setting('precision', 'bf16')}, {setting('device', 'cpu')}, or a teacher of a smaller "
                f"{setting('max_length')}"
            )
        else:
            del features
            if not self._said_halved:
                self._said_halved = True
                logger.warning(
                    "a batch does not fit into the memory of %s: it is encoded in halves; a %s below %s "
                    "saves the vain attempts",
                    self.device,
                    setting("batch_tokens"),
                    f"{self.batch_tokens:,}",
                )
            torch.cuda.empty_cache()
            for half in np.array_split(places, 2):
                yield from self._encode_batch(prepared, half)

    def _features(self, prepared: Prepared, places: NDArray[np.int64]) -> dict[str, Any]:
        """What the teacher's forward takes, on the device."""
        if prepared.tokens is None:
            return self._own_features([prepared.texts[place] for place in places])
        block, first = prepared.tokens, self._first
        features: dict[str, Any]
        if self.varlen:
            ids = [block.arrays["input_ids"][block.start[place] : block.start[place + 1]].tolist() for place in places]
            features = dict(first.data_collator([{"input_ids": row} for row in ids]))
            features.pop("labels", None)
            features["position_ids"] = features["position_ids"] + self.first_position
        else:
            features = {name: torch.from_numpy(array) for name, array in pad(block, places, first.tokenizer).items()}
        features = self._to_device(features)
        features["modality"] = "text" if "text" in first.modality_config else "message"
        if block.prompt_length is not None:
            features["prompt_length"] = block.prompt_length
        return features

    def _own_features(self, texts: list[str]) -> dict[str, Any]:
        return self._to_device(dict(self.teacher.preprocess(texts, prompt=self.prompt)))

    def _to_device(self, features: dict[str, Any]) -> dict[str, Any]:
        if self.device.type == "cuda":  # from pinned memory, so that nobody waits for the copy
            features = {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in features.items()}
        return {
            name: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in features.items()
        }

    @torch.inference_mode()
    def _forward(self, features: dict[str, Any]) -> Tensor:
        """Vectors `[n, T]`; a teacher cut to fewer dimensions (Matryoshka) gives those."""
        vectors: Tensor = self.teacher(features)["sentence_embedding"]
        return vectors if self.teacher.truncate_dim is None else vectors[:, : self.teacher.truncate_dim]

    def _to_cpu(self, vectors: Tensor, scale: Tensor | None) -> Callable[[], Any]:
        """Start copying stored vectors to the CPU; the function returned waits for them."""
        if self.device.type != "cuda":
            return lambda: (_stored(vectors.cpu(), self.dtype), None if scale is None else scale.cpu().numpy())
        on_cpu = [None if t is None else torch.empty_like(t, device="cpu", pin_memory=True) for t in (vectors, scale)]
        for target, tensor in zip(on_cpu, (vectors, scale), strict=True):
            if target is not None and tensor is not None:
                target.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))  # of the copy's device, which may not be the first one

        def wait() -> Any:
            event.synchronize()
            assert on_cpu[0] is not None
            return _stored(on_cpu[0], self.dtype), None if on_cpu[1] is None else on_cpu[1].numpy()

        return wait


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


def take_over_flattening(transformer: Any) -> int | None:
    """The first position of a text where a transformer runs without padding (flash attention), None where it pads.

    From here on its batches are laid flat by us.
    """
    if not transformer.can_flatten_inputs:
        return None
    first_position = int(transformer.preprocess(["a"])["position_ids"].min())  # RoBERTa's begin after the padding's
    transformer.can_flatten_inputs = False  # so that `tokenise` gets plain lists from it
    return first_position


def token_counts(features: dict[str, Any], num_texts: int) -> NDArray[np.int64]:
    """Tokens of each text of a batch `[num_texts]`; 0 where a teacher's own features do not tell."""
    if "attention_mask" in features:
        return np.asarray(features["attention_mask"].sum(1).cpu())
    if "cu_seq_lens_q" in features:  # laid flat by the teacher itself
        return np.diff(features["cu_seq_lens_q"].cpu().numpy())
    if "offsets" in features:
        return np.diff([*features["offsets"].tolist(), len(features["input_ids"])])
    return np.zeros(num_texts, np.int64)


def _deliver(waiting: deque[tuple[NDArray[np.int64], Callable[[], Any]]], sink: Sink) -> None:
    places, vectors = waiting.popleft()
    sink(places, vectors())


def _stored(vectors: Tensor, dtype: str) -> NDArray[Any]:
    array: NDArray[Any] = vectors.numpy()
    return array.view(np.uint16) if dtype == "bfloat16" else array
