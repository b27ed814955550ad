"""The score that picks the weights: on held-out images and their captions in a bank, or on named benchmarks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2clip.bank.reader import Bank
from llm2clip.config import check_choice
from llm2clip.data.bad import BadImage, BadSamples
from llm2clip.data.feeder import encoded
from llm2clip.data.images import load_image
from llm2clip.data.sample import ImageRef
from llm2clip.errors import LLM2CLIPError, UsageError, setting
from llm2clip.eval.named import Named
from llm2clip.protocols import Captioned, Encoder, Evaluator
from llm2clip.scores import Retrieval
from llm2clip.student.transform import ImageTransform

logger = logging.getLogger("llm2clip")
BATCH_SIZE = 128
ROWS_AT_ONCE = 4096
"""Captions' vectors that go through the adaptor together."""


RETRIEVED, ONE_OF_MANY = ("i2t_r@1", "t2i_r@1", "top1"), ("one-template/", "-tokens/")
"""The scores whose mean is that of a benchmark, and what the names of those hold that are of a part or another way."""


class BankSample(NamedTuple):
    """A sample of a bank as evaluators take one: its captions are rows.

    Its image is where that lies, or its number among the samples that an encoder is given.
    """

    image: ImageRef | int
    captions: Mapping[str, Sequence[int]]
    id: str = ""


class StudentEncoder:
    """The student in training as evaluators see it; its processes share the images, and all get all vectors.

    Processes that share the weights' shards must call the model equally often. So each takes equally many samples,
    numbers past the last one among them, and an image that cannot be read goes through the tower as a black one.

    Args:
        bank: the vectors of captions, and of all texts that are asked for.
        benchmark: what the samples are of, every image of which must be read; None where they are the bank's.
        threads: that read images.
    """

    def __init__(
        self,
        student: Any,
        accelerator: Any,
        bank: Bank,
        transform: ImageTransform,
        *,
        benchmark: str | None = None,
        threads: int = 1,
    ) -> None:
        self._student, self._accelerator, self._bank = student, accelerator, bank
        self._transform, self._benchmark, self._threads = transform, benchmark, threads
        self._samples: Sequence[Captioned] = ()
        self._unreadable: set[int] = set()

    def images(self, samples: Sequence[Captioned]) -> tuple[list[int], Tensor]:
        """The numbers of the samples whose image can be read, and their vectors [n, D] on the CPU.

        Raises:
            LLM2CLIPError: if there is none; of a benchmark, if one cannot be read.
        """
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        self._samples, self._unreadable = samples, set()
        own = (BankSample(number, {}) for number in range(rank, -(-len(samples) // world) * world, world))
        none_stop = BadSamples(1.0, quiet=True)
        with torch.no_grad(), self._accelerator.autocast():
            batches = list(encoded(own, self, batch_size=BATCH_SIZE, bad=none_stop, threads=self._threads))
        everyone = _all_parts([([s.image for s in batch], vectors) for batch, vectors in batches], world)
        unreadable = set(_all_parts(list(self._unreadable), world))
        numbers = [number for part, _ in everyone for number in part]
        kept = [row for row in np.argsort(numbers) if numbers[row] not in unreadable]
        what = f"{setting('val_bank')} {self._bank.folder}" if self._benchmark is None else self._benchmark
        bad = sorted(number for number in unreadable if number < len(samples))
        if bad and self._benchmark is not None:
            raise LLM2CLIPError(f"{what}: image {samples[bad[0]].id} cannot be read; a score on a part is no score")
        if not kept:
            raise LLM2CLIPError(f"{what}: none of its {len(samples)} images can be read")
        if len(kept) < len(samples):
            logger.warning("%s: %d of %d images cannot be read", what, len(samples) - len(kept), len(samples))
        vectors = torch.from_numpy(np.concatenate([vectors for _, vectors in everyone]))
        return [numbers[row] for row in kept], vectors[kept]

    def prepare_image(self, number: int) -> Tensor:
        """The pixels of a sample's image; black, and noted, if it cannot be read."""
        try:
            if number >= len(self._samples):
                raise BadImage("missing image", f"{number} of {len(self._samples)}")
            return self._transform(load_image(self._samples[number].image, min_size=self._transform.eval_decode_size))
        except BadImage:
            self._unreadable.add(number)
            return torch.zeros(3, *self._transform.image_size, dtype=torch.uint8)

    def encode_image(self, images: Sequence[Tensor], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """float32 [n, D]."""
        pixels = torch.stack(list(images)).to(self._accelerator.device)
        vectors: Tensor = self._student.get_image_features(pixels)
        return vectors.float().cpu().numpy()

    def texts(self, texts: Sequence[Any]) -> Tensor:
        """[N, D] on the CPU, of the bank's vectors of these texts; of its own captions, of these rows."""
        rows = np.array(texts, dtype=np.int64) if self._benchmark is None else self._bank.find(texts)
        parts = [torch.empty(0, 1)]
        with torch.no_grad(), self._accelerator.autocast():
            for start in range(0, len(rows), ROWS_AT_ONCE):
                vectors = torch.from_numpy(self._bank.vectors(rows[start : start + ROWS_AT_ONCE])).float()
                parts.append(self._student.get_text_features(vectors.to(self._accelerator.device)).float().cpu())
        return torch.cat(parts[1:] or parts)


class _Blank:
    """Gives every image and text the same vector: what evaluators say of it are names."""

    def images(self, samples: Sequence[Any]) -> tuple[list[int], Tensor]:
        return list(range(len(samples))), torch.ones(len(samples), 1)

    def texts(self, texts: Sequence[Any]) -> Tensor:
        return torch.ones(len(texts), 1)


Evaluators = Mapping[str | None, Sequence[Evaluator]]
"""What a student is scored by: of each benchmark, or of None, which is the bank itself."""


def open_evaluators(bank: Bank, benchmarks: Sequence[str], root: str | None, score: str | None) -> Evaluators:
    """What a student is scored by, all there.

    Args:
        bank: the held-out images, or the texts of the benchmarks.
        benchmarks: their names.
        root: the folder of their files.
        score: the one that picks the weights.

    Raises:
        UsageError: if the bank lacks texts of a benchmark, or there is no such score.
        SourceError: for files of a benchmark that are damaged, or not those of its protocol.
    """
    found: dict[str | None, Sequence[Evaluator]] = {}
    for name in dict.fromkeys(benchmarks):
        named = Named(name, str(root))
        texts = named.texts()
        absent = np.flatnonzero(bank.find(texts) < 0)
        if len(absent):
            asked = f"{setting('benchmark', tuple(benchmarks))} and {setting('root', root)}"
            raise UsageError(
                f"{setting('val_bank')} {bank.folder} lacks {len(absent):,} of {len(texts):,} texts of {name}, such as "
                f"{texts[absent[0]][:60]!r}; build it with llm2clip build-bank, {asked}"
            )
        found[name] = named.evaluators(images=True)
    if not found:
        if not (bank.num_samples and bank.image(0).path):
            raise UsageError(
                f"{setting('val_bank')} {bank.folder} holds texts without images; give {setting('val', ('NAME',))} or "
                "another bank"
            )
        found[None] = [Retrieval(bank_samples(bank), ks=(1,))]
    if score is not None:
        check_choice(setting("val_score"), score, scores_by(found, lambda _: _Blank()))
    return found


def scores_by(evaluators: Evaluators, encoder_of: Callable[[str | None], Encoder]) -> dict[str, float]:
    """The scores of an encoder: "<benchmark>/<score>", of the bank itself the score alone, and "r@1".

    "r@1" is the mean, over benchmarks, of the mean of R@1 both ways over all parts, or of top-1 accuracy.
    """
    found: dict[str, float] = {}
    means = []
    for benchmark, each in evaluators.items():
        encoder = encoder_of(benchmark)
        own = {score.name: score.value for evaluator in each for score in evaluator.run(encoder)}
        counted = [
            value
            for name, value in own.items()
            if name.rpartition("/")[2] in RETRIEVED and not any(part in name for part in ONE_OF_MANY)
        ]
        means.append(np.mean(counted))
        found |= {name if benchmark is None else f"{benchmark}/{name}": value for name, value in own.items()}
    return {**found, "r@1": float(np.mean(means))}


def validate(
    student: Any, accelerator: Any, bank: Bank, transform: ImageTransform, evaluators: Evaluators, *, workers: int = 0
) -> dict[str, float]:
    """The scores of `student` by their names behind "val/", see `scores_by`.

    Raises:
        LLM2CLIPError: if no image can be read; of a benchmark, if one cannot.
    """
    was_training = student.training
    student.eval()

    def encoder_of(benchmark: str | None) -> StudentEncoder:
        return StudentEncoder(student, accelerator, bank, transform, benchmark=benchmark, threads=max(1, workers))

    found = scores_by(evaluators, encoder_of)
    student.train(was_training)
    return {f"val/{name}": value for name, value in found.items()}


def bank_samples(bank: Bank) -> list[BankSample]:
    """All samples of a bank as `Retrieval` takes them, each with all kinds, so that scores come in the bank's order."""
    return [
        BankSample(bank.image(number), {kind: bank.rows(number, kind).tolist() for kind in bank.kinds})
        for number in range(bank.num_samples)
    ]


def _all_parts(parts: list[Any], world: int) -> list[Any]:
    """The parts of all processes."""
    if world == 1:
        return parts
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, parts)
    return [part for of_process in gathered for part in of_process]
