"""LLaVA's training data: conversations in JSON, images beside it, and the tokens whose loss counts: the answers'."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from examples.llava.make_llava import IMAGE, WORD
from llm2clip.artifacts import read_json
from llm2clip.errors import LLM2CLIPError, SourceError, UsageError, setting

logger = logging.getLogger("llm2clip")
ROLES = {"human": "user", "gpt": "assistant"}
IGNORED = -100
"""A label that counts for nothing, as torch's cross-entropy has it."""
SHOWN = 3
"""As many of the samples left out are named."""


@dataclass(frozen=True)
class Conversation:
    """One sample: its images, and turns as a chat template takes them.

    Attributes:
        messages: `{"role": "user" or "assistant", "content": ...}`, with an `<image>` and a line's end for each image.
    """

    name: str
    images: tuple[Path, ...]
    messages: list[dict[str, str]]


def read_conversations(data: Path, folder: Path, *, blind: bool = False) -> list[Conversation]:
    """The samples of a JSON file in LLaVA's layout; those that cannot be trained on are counted and named in the log.

    A sample is `{"id", "image" (none, one, or a list), "conversations": [{"from": "human" or "gpt", "value"}, ...]}`;
    `<image>` in a human's turn is an image, if the sample has any.

    Args:
        folder: what the images' paths begin in.
        blind: take away the images and what stands for them.

    Raises:
        UsageError, SourceError: if there is no such file, it has another layout, or nothing is left.
    """
    if not data.is_file():
        raise UsageError(f"{setting('data')} {data} is no file; give LLaVA's JSON (blip_laion_cc_sbu_558k.json, say)")
    rows, found, left_out = read_json(data), [], Counter[str]()
    examples: dict[str, list[str]] = {}
    if not isinstance(rows, list):
        raise SourceError(f"{data} holds no list of conversations, as LLaVA's files do")
    for number, row in enumerate(rows):
        try:
            sample = conversation_of(row, folder, name=str(row.get("id", number)), blind=blind)
        except (KeyError, TypeError, AttributeError):
            raise SourceError(f"{data}: sample {number} is no conversation in LLaVA's layout") from None
        except ValueError as error:
            left_out[str(error)] += 1
            examples.setdefault(str(error), []).append(str(row.get("image") or row.get("id", number)))
            continue
        found.append(sample)
    for why, count in left_out.items():
        named = ", ".join(examples[why][:SHOWN])
        logger.warning("%s: %s of %s samples left out, %s: %s", data.name, f"{count:,}", f"{len(rows):,}", why, named)
    if not found:
        raise SourceError(f"{data}: no sample is left; {setting('images')} {folder} is where their images should lie")
    return found


def conversation_of(row: dict[str, Any], folder: Path, *, name: str, blind: bool = False) -> Conversation:
    """A sample of LLaVA's JSON.

    Raises:
        ValueError: saying why it is left out.
    """
    given = row.get("image") or []
    images = tuple(folder / path for path in ([given] if isinstance(given, str) else given))
    messages, count = [], 0
    for turn in row["conversations"]:
        text, before = turn["value"], ""
        if images and turn["from"] == "human":  # LLaVA moves images to the front of their turn
            before = f"{IMAGE}\n" * text.count(IMAGE)
            count += text.count(IMAGE)
            text = text.replace(IMAGE, "").strip()
        text = text.replace(IMAGE, WORD)  # of an answer, or without an image
        messages.append({"role": ROLES[turn["from"]], "content": text if blind else before + text})
    while messages and messages[0]["role"] == "assistant":  # as LLaVA's own code: who answers was asked
        messages.pop(0)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("nobody answers")
    if any(one["role"] == two["role"] for one, two in itertools.pairwise(messages)):
        raise ValueError("the same speaks twice")
    if count != len(images):
        raise ValueError("not as many <image> as images")
    if not (blind or all(path.is_file() for path in images)):
        raise ValueError("images missing")
    return Conversation(name, () if blind else images, messages)


def image_tokens(processor: Any) -> int:
    """How many tokens an image becomes."""
    side = processor.image_processor.crop_size["height"] // processor.patch_size
    left_out = processor.vision_feature_select_strategy == "default"
    return side**2 + processor.num_additional_image_tokens - left_out


def answer_spans(messages: Sequence[dict[str, str]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as its chat template writes it, and where the answers stand, each with what ends it.

    Raises:
        LLM2CLIPError: if the template writes earlier turns in another way once more follow.
    """

    def written(turns: Sequence[dict[str, str]], *, answer_follows: bool = False) -> str:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=answer_follows, tokenize=False)

    whole, spans = written(messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = written(messages[:i], answer_follows=True)
            upto = written(messages[: i + 1]) if i + 1 < len(messages) else whole
            if not (whole.startswith(upto) and upto.startswith(before)):
                raise LLM2CLIPError(
                    "the LLM's chat template rewrites earlier turns, so that no one can say which tokens are answers; "
                    f"make the LLaVA with {setting('template', 'vicuna')}"
                )
            spans.append((len(before), len(upto)))
    return whole, spans


def plain_span(sample: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """LLaVA's first stage: images, then the caption and a line's end, without template or question."""
    images = IMAGE * len(sample.images)
    caption = next(message["content"] for message in sample.messages if message["role"] == "assistant")
    return f"{images}{caption}\n", [(len(images), len(images) + len(caption) + 1)]


def encode(sample: Conversation, processor: Any, *, plain: bool, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, cut to `max_length`; labels are `IGNORED` but for the answers.

    Raises:
        LLM2CLIPError: if an image's tokens would be cut.
    """
    tokenizer = processor.tokenizer
    text, spans = plain_span(sample) if plain else answer_spans(sample.messages, tokenizer)
    pieces, count, at, moved = text.split(IMAGE), image_tokens(processor), 0, {}
    for piece in pieces[:-1]:  # where a place in the text is once each <image> is written as often as it has tokens
        at += len(piece) + len(IMAGE)
        moved[at] = (count - 1) * len(IMAGE)
    spans = [tuple(end + sum(more for place, more in moved.items() if place <= end) for end in span) for span in spans]
    encoded = tokenizer(text.replace(IMAGE, IMAGE * count), return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if processor.image_token_id in ids[max_length:]:
        raise LLM2CLIPError(
            f"{sample.name}: its images take {ids.count(processor.image_token_id):,} tokens, {setting('max_length')} "
            f"{max_length:,} would cut them; give {setting('max_length', len(ids))}"
        )
    answers = [any(start < end and start < b and end > a for a, b in spans) for start, end in offsets]
    labels = [token if answer else IGNORED for token, answer in zip(ids, answers, strict=True)]
    return ids[:max_length], labels[:max_length]


@dataclass(frozen=True)
class Collator:
    """Conversations to a batch, with and without images side by side; runs in the loader's processes."""

    processor: Any
    plain: bool
    max_length: int

    def __call__(self, samples: Sequence[Conversation]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` [B, L], and all images, `pixel_values` [n, 3, H, W], if any."""
        encoded = [encode(each, self.processor, plain=self.plain, max_length=self.max_length) for each in samples]
        length = max(len(ids) for ids, _ in encoded)
        pad = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in encoded]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in encoded]),
            "labels": torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in encoded]),
        }
        if images := [open_image(path) for sample in samples for path in sample.images]:
            prepare = self.processor.image_processor  # the first stage of LLaVA crops, the second pads
            batch["pixel_values"] = prepare(images, do_pad=not self.plain, return_tensors="pt")["pixel_values"]
        return batch


def open_image(path: Path) -> Image.Image:
    """An image as RGB.

    Raises:
        SourceError: if it cannot be read.
    """
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise SourceError(f"image {path} cannot be read ({error}); take it out of the JSON, or mend it") from None
