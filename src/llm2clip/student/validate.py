"""The score that picks the weights: retrieval between held-out images and their captions' vectors in a bank."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.bank.reader import Bank
from llm2clip.data.bad import BadImage
from llm2clip.data.feeder import batched, prepared
from llm2clip.data.images import load_image
from llm2clip.errors import LLM2CLIPError, setting
from llm2clip.metrics import recall_both_ways
from llm2clip.student.transform import ImageTransform

logger = logging.getLogger("llm2clip")
BATCH_SIZE = 128


def encode_images(
    encode: Callable[[Tensor], Tensor], bank: Bank, samples: range, transform: ImageTransform, *, threads: int = 1
) -> Iterator[tuple[list[int], Tensor]]:
    """Sample numbers and vectors [n, D] on the CPU, batch by batch; unreadable images are left out.

    Args:
        encode: pixels uint8 [n, 3, H, W] to vectors [n, D]; called once a batch whatever can be read, as processes
            that share the weights' shards must call the model equally often.
        samples: which images; numbers past the last one are left out, too.
    """

    def prepare(sample: int) -> Tensor:
        if sample >= bank.num_samples:
            raise BadImage("missing image", f"{sample} of {bank.num_samples}")
        return transform(load_image(bank.image(sample), min_size=transform.eval_decode_size))

    for batch in batched(prepared(samples, prepare, ahead=BATCH_SIZE, threads=threads), BATCH_SIZE):
        pixels = torch.zeros(len(batch), 3, *transform.image_size, dtype=torch.uint8)
        readable = []
        for place, (_, image) in enumerate(batch):
            with contextlib.suppress(BadImage):
                pixels[place] = image.result()
                readable.append(place)
        yield [batch[place][0] for place in readable], encode(pixels).float().cpu()[readable]


def retrieval_scores(
    images: Tensor, image_ids: list[int], captions: Mapping[str, tuple[Tensor, list[int]]]
) -> dict[str, float]:
    """R@1 both ways for each kind of caption, and their mean as `r@1`.

    Args:
        images: [N, D].
        image_ids: sample of each image.
        captions: kind to vectors [M, D] and the sample of each.
    """
    scores = {}
    for kind, (vectors, ids) in captions.items():
        answerable = set(image_ids) & set(ids)
        if not answerable:
            continue
        rows = [i for i, sample in enumerate(image_ids) if sample in answerable]
        columns = [i for i, sample in enumerate(ids) if sample in answerable]
        there, back = recall_both_ways(
            images[rows], vectors[columns], [image_ids[i] for i in rows], [ids[i] for i in columns], ks=(1,)
        )
        scores[f"val/{kind}/i2t_r@1"], scores[f"val/{kind}/t2i_r@1"] = there[1], back[1]
    return {**scores, "val/r@1": float(np.mean(list(scores.values())))}


def validate(
    student: Any, accelerator: Any, bank: Bank, transform: ImageTransform, *, workers: int = 0
) -> dict[str, float]:
    """Scores of `student` on every readable image and every caption of `bank`, the images shared among processes.

    Raises:
        LLM2CLIPError: if no image can be read.
    """
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    was_training = student.training
    student.eval()
    with torch.no_grad(), accelerator.autocast():
        own = range(rank, -(-bank.num_samples // world) * world, world)  # equally many on all processes
        encode = lambda pixels: student.get_image_features(pixels.to(device))  # noqa: E731
        parts = list(encode_images(encode, bank, own, transform, threads=max(1, workers)))
        captions = {kind: _encode_captions(student, bank, kind, device) for kind in bank.kinds}
    student.train(was_training)
    everyone = _all_parts(parts, world)
    ids = [sample for numbers, _ in everyone for sample in numbers]
    if not ids:
        raise LLM2CLIPError(f"{setting('val_bank')} {bank.folder}: none of its {bank.num_samples} images can be read")
    if len(ids) < bank.num_samples:
        unread = bank.num_samples - len(ids)
        logger.warning("%s: %d of %d images cannot be read", setting("val_bank"), unread, bank.num_samples)
    return retrieval_scores(torch.cat([vectors for _, vectors in everyone]), ids, captions)


def _encode_captions(student: Any, bank: Bank, kind: str, device: torch.device) -> tuple[Tensor, list[int]]:
    """Vectors [M, D] of all captions of a kind, and the sample of each."""
    rows = [bank.rows(sample, kind) for sample in range(bank.num_samples)]
    ids = [sample for sample, own in enumerate(rows) for _ in own]
    every = np.concatenate(rows)
    parts = [
        student.get_text_features(torch.from_numpy(bank.vectors(every[i : i + 4096])).float().to(device)).float().cpu()
        for i in range(0, len(every), 4096)
    ]
    return torch.cat(parts) if parts else torch.empty(0, 1), ids


def _all_parts(parts: list[Any], world: int) -> list[Any]:
    """The parts of all processes."""
    if world == 1:
        return parts
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, parts)
    return [part for of_process in gathered for part in of_process]
