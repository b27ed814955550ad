"""What of a model captions reach, seen by running a short one through it; and what of captions the model cannot take.

All of this is asked before the first batch: a caption of a training that fails after an hour says less, and later.
"""

from __future__ import annotations

import bisect
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm2clip.errors import UsageError, setting, shortened

FIRST_ID = 10
"""Of the token ids of a probe: most vocabularies begin with special tokens."""
PROBE_TOKENS = 6
FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot take its input."""
POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions")
"""Names, in configs, of the number of positions a model knows."""
MOST_PROBED = 8192
"""Tokens of the longest probe; who reads more has no table of positions."""
TABLE = re.compile(r"pos|wpe|alibi")
"""In the names of position tables, learned ones and buffers; rotary positions are computed."""
OFFSET = 8
"""Positions that may be taken already: RoBERTa counts from the padding token's id plus one."""


def run_probe(model: nn.Module) -> Tensor:
    """What the LLM `model` gives for one caption of a few tokens; without their attention mask nothing is padding."""
    ids = torch.arange(FIRST_ID, FIRST_ID + PROBE_TOKENS, device=next(model.parameters()).device)[None]
    output: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)[0]
    return output


def reached_modules(model: nn.Module) -> list[str]:
    """Names of the modules that a caption passes, in the model's own order; the image half of an LLM is not there."""
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))  # type: ignore[misc]
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run_probe(model)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, _ in model.named_modules() if name in called]


def adaptable(model: Any) -> tuple[list[str], list[str]]:
    """Where adapters belong: linear layers that captions pass, but not the output layer, and stacked linear layers.

    Returns:
        Names of linear layers, and names of weights `[experts, ...]`, which mixtures of experts hold as one parameter.
    """
    head = model.get_output_embeddings()
    layers, stacks = [], []
    for name in reached_modules(model):
        module = model.get_submodule(name)
        if isinstance(module, (nn.Linear, Conv1D)):
            if module is not head:
                layers.append(name)
        elif "expert" in f"{name} {type(module).__name__}".lower():
            stacks += [f"{name}.{key}" for key, weight in module.named_parameters(recurse=False) if weight.dim() == 3]
    return layers, stacks


def freeze_unreached(model: nn.Module) -> list[str]:
    """Freeze the weights that captions do not reach, which would get no gradient; returns their names.

    They are found in the graph of the probe: unlike modules, weights can be used without being called.
    """
    with torch.enable_grad():
        output = run_probe(model)
    waiting, seen, reached = [output.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        waiting += [following for following, _ in node.next_functions]
    frozen = [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in reached]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def check_tokens(model: Any, tokenizer: Any, name: Any, *, header: str = "") -> None:
    """Raise if a token that captions are made of has no row in the model's embedding; padding gets one that has.

    Special tokens that only a caption which spells them out would hold are let pass: some LLMs for text alone come with
    the image token of their family.

    Args:
        header: stands before each caption.

    Raises:
        UsageError: naming a token and what to do.
    """
    try:
        rows = len(model.get_input_embeddings().weight)
    except FAILURES:  # no embedding by that name
        return
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    frame = set(tokenizer(header)["input_ids"])
    beyond = {
        i: token for token, i in tokenizer.get_vocab().items() if i >= rows and (i in frame or token not in special)
    }
    if beyond:
        number, token = min(beyond.items())
        raise UsageError(
            f"{name}: its tokenizer's token {token!r} has the id {number}, and its embedding only {rows} rows "
            f"({len(beyond)} such tokens); resize the model to its tokenizer (resize_token_embeddings) and save both "
            "again, or put the tokenizer beside it that it was trained with"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        usable = [token for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.cls_token) if token]
        usable = [token for token in usable if tokenizer.convert_tokens_to_ids(token) < rows]
        if not usable:
            raise UsageError(
                f"{name}: its padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, and its "
                f"embedding only {rows} rows; give its tokenizer another padding token"
            )
        tokenizer.pad_token = usable[0]  # masked: no vector hangs on which one it is


def check_length(transformer: Transformer, name: Any) -> None:
    """Raise if the model has no position for the last of the tokens that it is to read of a caption.

    Only models with a table of positions are asked, by a run as far as the table is read.

    Raises:
        UsageError: saying how many it has.
    """
    model: Any = transformer.model
    config, limit = model.config.get_text_config(), transformer.max_seq_length
    stated = next((value for key in POSITIONS if isinstance(value := getattr(config, key, None), int)), None)
    if limit is None or (stated is not None and limit + OFFSET <= stated):
        return
    learned = any(isinstance(part, nn.Embedding) and TABLE.search(key) for key, part in model.named_modules())
    if not (learned or any(TABLE.search(key) for key, _ in model.named_buffers()) or hasattr(config, "max_seq_len")):
        return  # positions are computed
    longest = min(limit, (stated or limit) + OFFSET, MOST_PROBED)

    def fails(length: int) -> bool:
        ids = torch.full((1, length), FIRST_ID, device=model.device)
        try:
            with torch.no_grad(), _first_block_only(model, before=learned):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (_Enough, torch.OutOfMemoryError):
            return False
        except FAILURES:
            return True
        return False

    if not fails(longest):
        return
    # A GPU does not recover from such a failure: there the config has to be believed.
    room = stated if model.device.type != "cpu" else bisect.bisect_left(range(1, longest), True, key=fails)
    has = f"positions for {room} tokens" if room else "too few positions"
    raise UsageError(
        f"{name} has {has}, and is to read {limit} of a caption; give {setting('max_length', room or 'LESS')}, or set "
        "it as max_seq_length of a saved embedder"
    )


class _Enough(Exception):
    """A probe has come as far as it should."""


@contextlib.contextmanager
def _first_block_only(model: nn.Module, *, before: bool) -> Iterator[None]:
    """Within it, a run of the model ends with `_Enough` after its first block, or before that."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]

    def stop(*_: Any) -> None:
        raise _Enough

    hooks = []
    if lists:
        block = max(lists, key=len)[0]
        hooks = [block.register_forward_pre_hook(stop) if before else block.register_forward_hook(stop)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def exact_targets(model: Any, *, needed: bool) -> Iterator[None]:
    """Let peft put adapters exactly where it is told: of mixtures of experts it takes names for old ones."""
    if not needed:
        yield
        return
    kind = model.config.model_type
    model.config.model_type = ""
    try:
        yield
    finally:
        model.config.model_type = kind


def first_line(error: Exception) -> str:
    """An error's text as part of a line."""
    return shortened(f"{type(error).__name__}: {error}", most=200)
