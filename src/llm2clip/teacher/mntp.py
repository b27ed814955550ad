"""Masked next-token prediction, an optional first step: an LLM learns to make use of two-way attention.

As in LLM2Vec (https://arxiv.org/abs/2404.05961, section 2.1): a share of the tokens is hidden, and each hidden token is
predicted from the state of the token *before* it, where a causal LLM is used to predict it. The adapters are merged
before the contrastive step.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.teacher.mixture import BatchOrder, Key
from llm2clip.teacher.opening import one_line_errors
from llm2clip.teacher.store import open_rows, write_rows
from llm2clip.teacher.trainer import Log, OneDevice, Run, TrainedWeights, prepare_model, run_trainer
from llm2clip.teacher.tuning import is_sharded, load_trained, trained_weights, with_lora

KEEP, REPLACE = 0.1, 0.1
"""Of the chosen tokens, the share left as it is and the share replaced by a random token, as in BERT; the rest is
replaced by the mask token."""
NO_LABEL = -100
BLANK = "_"
"""The mask token of LLM2Vec's Llama models, which have none of their own."""


class MaskedTexts(Dataset[dict[str, list[int]]]):
    """Texts with hidden tokens, indexed by the keys of a `BatchOrder` over one task.

    Args:
        captions: stored captions; of each row one caption, another one in each pass.
        texts: stored plain texts.
    """

    def __init__(self, captions: Any, texts: Any, tokenizer: Any, *, share: float, mask_id: int, seed: int) -> None:
        self.captions, self.texts, self.tokenizer = captions, texts, tokenizer
        self.share, self.mask_id, self.seed = share, mask_id, seed

    def __len__(self) -> int:
        return len(self.captions) + len(self.texts)

    def __getitem__(self, key: Key) -> dict[str, list[int]]:
        _, epoch, index = key
        draw = random.Random(f"mntp/{self.seed}/{epoch}/{index}")
        if index < len(self.captions):
            text = draw.choice(self.captions[index]["texts"])
        else:
            text = self.texts[index - len(self.captions)]["text"]
        ids = self.tokenizer(text, truncation=True)["input_ids"]
        special = set(self.tokenizer.all_special_ids)
        inputs, labels = mask_tokens(
            ids, share=self.share, mask_id=self.mask_id, vocabulary=len(self.tokenizer), special=special, draw=draw
        )
        return {"input_ids": inputs, "labels": labels}


def mask_tokens(
    ids: Sequence[int], *, share: float, mask_id: int, vocabulary: int, special: set[int], draw: random.Random
) -> tuple[list[int], list[int]]:
    """Hide a share of the tokens; returns what the LLM reads, and the hidden tokens (-100 elsewhere).

    The first token has no token before it to be predicted from, and special ones need no guessing: neither is hidden.
    At least one token is hidden if any can be.
    """
    open_to = [i for i, token in enumerate(ids) if i > 0 and token not in special]
    chosen = [i for i in open_to if draw.random() < share] or (draw.sample(open_to, 1) if open_to else [])
    inputs, labels = list(ids), [NO_LABEL] * len(ids)
    for i in chosen:
        labels[i] = ids[i]
        fate = draw.random()
        if fate >= KEEP + REPLACE:
            inputs[i] = mask_id
        elif fate >= KEEP:
            inputs[i] = draw.randrange(vocabulary)
    return inputs, labels


def pad(rows: Sequence[dict[str, list[int]]], *, pad_id: int) -> dict[str, Tensor]:
    """The rows as tensors `[B, T]`, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    filled = {
        "input_ids": [row["input_ids"] + [pad_id] * (width - len(row["input_ids"])) for row in rows],
        "labels": [row["labels"] + [NO_LABEL] * (width - len(row["labels"])) for row in rows],
        "attention_mask": [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows],
    }
    return {name: torch.tensor(value) for name, value in filled.items()}


class StepArguments(OneDevice, TrainingArguments):  # type: ignore[misc]
    """Arguments of the trainer on masked texts."""


class MaskedTrainer(TrainedWeights, Trainer):  # type: ignore[misc]
    """transformers' trainer, reading masked texts in a `BatchOrder`."""

    def __init__(self, *, texts: MaskedTexts, order: BatchOrder, pad_id: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.texts, self.order, self.pad_id = texts, order, pad_id

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of this process's parts of the batches."""
        self.accelerator.even_batches = False
        loader: DataLoader[Any] = DataLoader(
            self.texts,
            batch_sampler=self.order,
            collate_fn=lambda rows: pad(rows, pad_id=self.pad_id),
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)


def train_mntp(
    model: str | Path,
    out: Path,
    *,
    captions: Any,
    texts: Any,
    run: Run,
    batch_size: int,
    num_processes: int = 1,
    main: bool = True,
    share: float = 0.2,
    mask_token: str | None = None,
    max_length: int = 512,
    lora: dict[str, Any] | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Path:
    """Train the LLM in `model` and write it, with its tokenizer, to `out`; returns `out`, at once if it is there.

    Args:
        captions: stored captions, or an empty list.
        texts: stored plain texts, or an empty list.
        lora: rank, alpha and dropout of adapters on every linear layer, or None to train every weight.

    Raises:
        UsageError: if `mask_token` is no token, or there are fewer texts than a batch holds.
    """
    if out.exists():
        return out

    def load() -> tuple[Any, Any]:
        causal_lm, tokenizer = load_causal_lm(
            model, max_length=max_length, dtype=dtype, trust_remote_code=trust_remote_code
        )
        causal_lm.config.is_causal = False
        return causal_lm if lora is None else with_lora(causal_lm, **lora, seed=run.seed), tokenizer

    causal_lm, tokenizer = load()
    data = MaskedTexts(
        captions, texts, tokenizer, share=share, mask_id=mask_token_id(tokenizer, mask_token), seed=run.seed
    )
    if len(data) < batch_size:
        raise UsageError(
            f"{setting('mntp')} has {len(data)} texts, fewer than {setting('mntp_batch_size')} {batch_size}"
        )
    order = BatchOrder([len(data)], batch_size=batch_size, steps=run.steps, seed=run.seed, num_parts=num_processes)
    prepare_model(causal_lm, run)
    trainer = MaskedTrainer(
        model=causal_lm,
        args=StepArguments(**run.arguments(batch_size=order.batch_size)),
        callbacks=[Log(run.log, description="masked next-token prediction")],
        texts=data,
        order=order,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
    )
    run_trainer(trainer, smaller="mntp_batch_size")
    if is_sharded(causal_lm):  # one process puts the whole together again
        weights = trained_weights(causal_lm)
        causal_lm, _ = load()
        load_trained(causal_lm, weights)
    if main:
        merged = causal_lm.merge_and_unload() if lora is not None else causal_lm
        partial = out.with_name(out.name + ".partial")
        merged.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        os.replace(partial, out)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return out


def load_causal_lm(
    name: str | Path, *, max_length: int, dtype: str, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """The LLM with its output layer, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with one_line_errors(name):
        causal_lm = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    tokenizer.model_max_length = min(max_length, tokenizer.model_max_length)
    causal_lm.config.use_cache = False
    return causal_lm, tokenizer


def mask_token_id(tokenizer: Any, mask_token: str | None) -> int:
    """The id of the token that stands for a hidden one.

    Raises:
        UsageError: if `mask_token` is not one token of the vocabulary.
    """
    if mask_token is None and tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    token = mask_token if mask_token is not None else BLANK
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UsageError(
            f"{setting('mntp_mask_token')} {token!r} is not one token of this LLM's vocabulary; give one that is"
        )
    return int(ids[0])


def store_lines(path: Path, files: Iterable[str]) -> Any:
    """The lines of text files that are not blank, stored at `path` and opened.

    Raises:
        SourceError: if a file cannot be read, or all are blank.
    """
    if not path.exists():
        import pyarrow as pa

        write_rows(path, _lines(files), {"text": pa.string()})
    rows = open_rows(path)
    if not len(rows):
        raise SourceError(f"{setting('mntp_text')} {' '.join(files)} holds no text")
    return rows


def _lines(files: Iterable[str]) -> Iterator[dict[str, str]]:
    for name in files:
        try:
            with Path(name).open(encoding="utf-8-sig") as file:
                yield from ({"text": line.strip()} for line in file if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{setting('mntp_text')} {name} cannot be read: {error}") from None
