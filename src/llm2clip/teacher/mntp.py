"""Masked next-token prediction, an optional first step: an LLM learns to make use of two-way attention.

As in LLM2Vec (https://arxiv.org/abs/2404.05961, section 2.1): a share of the tokens is hidden, and each hidden token is
predicted from the state of the token *before* it, where a causal LLM is used to predict it. So the loss is the causal
LLM's own. The adapters are merged before the contrastive step.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, Trainer

from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.hub import ModelFolder, drop_remote_code
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.data import TEXT, stored
from llm2clip.teacher.mixture import BatchOrder, Key
from llm2clip.teacher.model import one_line_errors, prepare_tokenizer
from llm2clip.teacher.reach import check_tokens
from llm2clip.teacher.trainer import Log, OrderedTrainer, arguments, prepare_model, run_trainer
from llm2clip.teacher.tuning import is_sharded, load_trained, trained_weights, with_lora

MNTP_LOG = "mntp.jsonl"
BLANK = "_"
"""The mask token of LLM2Vec's Llama models, which have none of their own."""


class MaskedTexts(Dataset[dict[str, list[int]]]):
    """Texts with hidden tokens, indexed by the keys of a `BatchOrder` over one task.

    What is hidden of a text hangs on `seed`, the pass and its place alone, so that it is the same on any number of
    processes, and in a run that goes on.

    Args:
        captions: stored captions; of each row one caption, another one in each pass.
        texts: stored plain texts.
        share: of the tokens that are hidden; of a text at least one.
        mask_id: the token read in place of eight in ten hidden ones; one in ten is read as it is, and for one in ten a
            random token, as in BERT.
    """

    def __init__(self, captions: Any, texts: Any, tokenizer: Any, *, share: float, mask_id: int, seed: int) -> None:
        self.captions, self.texts, self.tokenizer, self.share, self.seed = captions, texts, tokenizer, share, seed
        masking = copy.deepcopy(tokenizer)  # the teacher's own is saved, and must not take "_" for a special token
        masking.mask_token = masking.convert_ids_to_tokens(mask_id)
        self.collator = DataCollatorForLanguageModeling(
            masking, mlm_probability=1.0, mask_replace_prob=0.8, random_replace_prob=0.1
        )

    def __len__(self) -> int:
        return len(self.captions) + len(self.texts)

    def __getitem__(self, key: Key) -> dict[str, list[int]]:
        _, epoch, index = key
        draw = random.Random(f"mntp/{self.seed}/{epoch}/{index}")
        if index < len(self.captions):
            text = draw.choice(self.captions[index]["texts"])
        else:
            text = self.texts[index - len(self.captions)]["text"]
        return self.hide(self.tokenizer(text, truncation=True)["input_ids"], draw)

    def hide(self, ids: list[int], draw: random.Random) -> dict[str, list[int]]:
        """What the LLM reads of a text's tokens, and as labels the hidden ones (-100 elsewhere)."""
        special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        # The first token has no token before it to be predicted from, and special ones need no guessing.
        open_to = [i for i in range(1, len(ids)) if not special[i]]
        # At least one: of a batch without any the mean loss would be no number.
        chosen = [i for i in open_to if draw.random() < self.share] or draw.sample(open_to, min(1, len(open_to)))
        self.collator.generator = torch.Generator().manual_seed(draw.getrandbits(63))
        hidden = self.collator([{"input_ids": ids, "special_tokens_mask": [i not in chosen for i in range(len(ids))]}])
        return {name: hidden[name][0].tolist() for name in ("input_ids", "labels")}


class MaskedTrainer(OrderedTrainer, Trainer):  # type: ignore[misc]
    """transformers' trainer, on masked texts."""


def train_mntp(config: TeacherConfig, model: ModelFolder, captions: Any, state: PartialState) -> Path:
    """Train the LLM in `model` and write it, with its tokenizer; returns its folder, at once if it is there.

    Args:
        captions: stored captions, or an empty list.

    Raises:
        UsageError: if there are fewer texts than a batch holds.
        SourceError: if a file of plain text cannot be read, or all are blank.
    """
    out = config.work / "mntp"
    if out.exists():
        return out
    with state.main_process_first():
        texts = store_lines(config.work / "mntp-text.arrow", config.mntp_text) if config.mntp_text else []

    def load() -> tuple[Any, Any]:
        lora = config.tuning == "lora"
        causal_lm, tokenizer = load_causal_lm(
            model.path,
            max_length=config.max_length,
            dtype=config.load_dtype if lora else "float32",  # without adapters this step trains the weights held
            trust_remote_code=config.trust_remote_code,
        )
        causal_lm.config.is_causal = False
        if lora:
            rank, alpha, dropout = config.lora_rank, config.lora_alpha, config.lora_dropout
            causal_lm = with_lora(causal_lm, rank=rank, alpha=alpha, dropout=dropout, seed=config.seed)
        return causal_lm, tokenizer

    causal_lm, tokenizer = load()
    mask_id = mask_token_id(tokenizer, config.mntp_mask_token)
    rows = len(causal_lm.get_input_embeddings().weight)
    if mask_id >= rows:
        raise UsageError(
            f"{setting('mntp_mask_token')} has the id {mask_id}, and the LLM's embedding only {rows} rows; name another"
        )
    data = MaskedTexts(captions, texts, tokenizer, share=config.mntp_mask, mask_id=mask_id, seed=config.seed)
    batch_size = config.mntp_batch_size
    if len(data) < batch_size:
        raise UsageError(
            f"{setting('mntp')} has {len(data)} texts, fewer than {setting('mntp_batch_size')} {batch_size}"
        )
    parts = state.num_processes
    order = BatchOrder([len(data)], batch_size=batch_size, steps=config.mntp_steps, seed=config.seed, num_parts=parts)
    prepare_model(causal_lm, config, attention_dropout=0.0)
    trainer = MaskedTrainer(
        model=causal_lm,
        args=arguments(config, order, folder="mntp-checkpoints"),
        data_collator=DataCollatorForTokenClassification(tokenizer),  # pads, and leaves the padding unlabelled
        rows=data,
        order=order,
    )
    description = "masked next-token prediction"
    trainer.add_callback(Log(trainer.accelerator, Path(config.out), file=MNTP_LOG, description=description))
    run_trainer(trainer, smaller="mntp_batch_size")
    if is_sharded(causal_lm):  # one process puts the whole together again
        weights = trained_weights(causal_lm)
        causal_lm, _ = load()
        load_trained(causal_lm, weights)
    if state.is_main_process:
        merged = causal_lm.merge_and_unload() if config.tuning == "lora" else causal_lm
        partial = out.with_name(out.name + ".partial")
        merged.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        os.replace(partial, out)
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    state.wait_for_everyone()
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
    drop_remote_code(causal_lm)
    prepare_tokenizer(tokenizer, name)
    check_tokens(causal_lm, tokenizer, name)
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
    rows, _ = stored(path, _lines(files), {"text": TEXT})
    return rows


def _lines(files: Iterable[str]) -> Iterator[dict[str, str]]:
    found = False
    for name in files:
        try:
            with Path(name).open(encoding="utf-8-sig") as file:
                for text in filter(None, map(str.strip, file)):
                    found = True
                    yield {"text": text}
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{setting('mntp_text')} {name} cannot be read: {error}") from None
    if not found:
        raise SourceError(f"{setting('mntp_text')} {' '.join(files)} holds no text")
