"""The score that picks the weights: retrieval between held-out images and their captions' vectors in a bank."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2clip.bank.reader import Bank
from llm2clip.data.bad import BadImage, BadSamples
from llm2clip.data.feeder import encoded
from llm2clip.data.images import load_image
from llm2clip.errors import LLM2CLIPError, setting
from llm2clip.scores import Retrieval
from llm2clip.student.transform import ImageTransform

logger = logging.getLogger("llm2clip")
BATCH_SIZE = 128
ROWS_AT_ONCE = 4096
"""Captions' vectors that go through the adaptor together."""


class BankSample(NamedTuple):
    """A sample of a bank as evaluators take one: its image is its number, its captions are rows."""

    image: int
    captions: Mapping[str, Sequence[int]]
    id: str = ""


class StudentEncoder:
    """The student in training as evaluators see it; its processes share the images, and all get all vectors.

    Processes that share the weights' shards must call the model equally often. So each takes equally many samples,
    numbers past the last one among them, and an image that cannot be read goes through the tower as a black one.

    Args:
        threads: that read images.
    """

    def __init__(
        self, student: Any, accelerator: Any, bank: Bank, transform: ImageTransform, *, threads: int = 1
    ) -> None:
        self._student, self._accelerator, self._bank = student, accelerator, bank
        self._transform, self._threads = transform, threads
        self._unreadable: set[int] = set()

    def images(self, samples: Sequence[BankSample]) -> tuple[list[int], Tensor]:
        """The samples of a whole bank whose image can be read, and their vectors [n, D] on the CPU.

        Raises:
            LLM2CLIPError: if there is none.
        """
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        own = (BankSample(number, {}) for number in range(rank, -(-len(samples) // world) * world, world))
        none_stop = BadSamples(1.0, quiet=True)
        with torch.no_grad(), self._accelerator.autocast():
            batches = list(encoded(own, self, batch_size=BATCH_SIZE, bad=none_stop, threads=self._threads))
        everyone = _all_parts([([s.image for s in batch], vectors) for batch, vectors in batches], world)
        unreadable = set(_all_parts(list(self._unreadable), world))
        numbers = [number for part, _ in everyone for number in part]
        kept = [row for row, number in enumerate(numbers) if number not in unreadable]
        what = f"{setting('val_bank')} {self._bank.folder}"
        if not kept:
            raise LLM2CLIPError(f"{what}: none of its {len(samples)} images can be read")
        if len(kept) < len(samples):
            logger.warning("%s: %d of %d images cannot be read", what, len(samples) - len(kept), len(samples))
        vectors = torch.from_numpy(np.concatenate([vectors for _, vectors in everyone]))
        return [numbers[row] for row in kept], vectors[kept]

    def prepare_image(self, number: int) -> Tensor:
        """The pixels of a sample's image; black, and noted, if it cannot be read."""
        try:
            if number >= self._bank.num_samples:
                raise BadImage("missing image", f"{number} of {self._bank.num_samples}")
            return self._transform(load_image(self._bank.image(number), min_size=self._transform.eval_decode_size))
        except BadImage:
            self._unreadable.add(number)
            return torch.zeros(3, *self._transform.image_size, dtype=torch.uint8)

    def encode_image(self, images: Sequence[Tensor], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """float32 [n, D]."""
        pixels = torch.stack(list(images)).to(self._accelerator.device)
        vectors: Tensor = self._student.get_image_features(pixels)
        return vectors.float().cpu().numpy()

    def texts(self, texts: Sequence[int]) -> Tensor:
        """[N, D] on the CPU, of the bank's vectors in these rows."""
        rows, parts = np.array(texts, dtype=np.int64), [torch.empty(0, 1)]
        with torch.no_grad(), self._accelerator.autocast():
            for start in range(0, len(rows), ROWS_AT_ONCE):
                vectors = torch.from_numpy(self._bank.vectors(rows[start : start + ROWS_AT_ONCE])).float()
                parts.append(self._student.get_text_features(vectors.to(self._accelerator.device)).float().cpu())
        return torch.cat(parts[1:] or parts)


def validate(
    student: Any, accelerator: Any, bank: Bank, transform: ImageTransform, *, workers: int = 0
) -> dict[str, float]:
    """R@1 of `student` on every readable image and every caption of `bank`, both ways by kind, and their mean.

    Raises:
        LLM2CLIPError: if no image can be read.
    """
    was_training = student.training
    student.eval()
    encoder = StudentEncoder(student, accelerator, bank, transform, threads=max(1, workers))
    found = {f"val/{score.name}": score.value for score in Retrieval(bank_samples(bank), ks=(1,)).run(encoder)}
    student.train(was_training)
    return {**found, "val/r@1": float(np.mean(list(found.values())))}


def bank_samples(bank: Bank) -> list[BankSample]:
    """All samples of a bank as `Retrieval` takes them, each with all kinds, so that scores come in the bank's order."""
    return [
        BankSample(number, {kind: bank.rows(number, kind).tolist() for kind in bank.kinds})
        for number in range(bank.num_samples)
    ]


def _all_parts(parts: list[Any], world: int) -> list[Any]:
    """The parts of all processes."""
    if world == 1:
        return parts
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, parts)
    return [part for of_process in gathered for part in of_process]
