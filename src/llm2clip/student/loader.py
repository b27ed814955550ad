"""Batches one after another: read by worker processes, put together, and copied to the device one batch ahead."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llm2clip.compat import take_back_signal_handler
from llm2clip.data.bad import BadSamples
from llm2clip.errors import LLM2CLIPError, setting
from llm2clip.student.data import BankDataset, Batch, Part

CHUNK = 64
"""Images that a worker reads at a time: a large batch is shared by all of them, and is there after a short while."""
MAX_AHEAD_BYTES = 4 << 30
"""Pixels that the workers of one process read ahead."""


class BankLoader:
    """This process's slice of each batch, in order, from any batch on.

    The slices of all processes, in the order of their numbers, are the batch that one process would see. Workers change
    the speed, never a batch.

    Args:
        dataset: the parts of batches.
        process: number of this process, among the dataset's `num_processes`.
        workers: processes that read ahead; 0 reads here, when a batch is asked for.
        device: where batches are put; on a GPU one batch ahead, beside the computation.
        max_bad_fraction: share of bad samples above which the run stops.

    Attributes:
        bad: bad samples of this process's slices, among the batches handed out.
        seen: samples of this process's slices, bad ones included.

    Example:
        >>> loader = BankLoader(dataset, workers=4)                        # doctest: +SKIP
        >>> for batch in loader.batches(start=100, stop=200): ...          # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: BankDataset,
        *,
        process: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        max_bad_fraction: float = 0.05,
    ) -> None:
        self.dataset, self.workers, self.device = dataset, workers, torch.device(device)
        self.size = dataset.batch_size // dataset.num_processes
        self.first = process * self.size
        self.bad, self.seen = BadSamples(max_bad_fraction), 0

    @property
    def num_samples(self) -> int:
        """Samples of all banks."""
        return self.dataset.num_samples

    @property
    def batches_per_epoch(self) -> int:
        """Batches in a pass over all banks."""
        return self.dataset.batches_per_epoch

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches number `start` up to `stop` (without it, endlessly), counted on through all epochs.

        Raises:
            TooManyBadSamples: above `max_bad_fraction`, checked from 1000 samples on, and when `stop` is reached.
            LLM2CLIPError: if a worker dies or a source cannot be read.
        """
        batches = self._host_batches(start, stop)
        if self.device.type == "cuda":
            batches = one_ahead(batches, self.device)
        for batch in batches:
            self.seen += len(batch) + len(batch.bad)
            for sample_id, cause, detail in batch.bad:
                self.bad.add(sample_id, cause, detail)
            self.bad.check(self.seen, final=False)
            yield batch
            del batch  # before the next is asked for: a batch may be gigabytes
        self.bad.check(self.seen)

    def state(self) -> dict[str, Any]:
        """What was counted so far, JSON-ready, for a checkpoint."""
        return {"seen": self.seen, "bad": self.bad.to_json()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting from the `state` of an earlier run."""
        self.seen = state["seen"]
        self.bad.clear()
        self.bad.merge(state["bad"])

    def _host_batches(self, start: int, stop: int | None) -> Iterator[Batch]:
        parts = iter(self._chunks(start, stop))
        for chunk in parts:
            if len(chunk) == self.size:
                yield chunk.map(lambda value: value.to(self.device, non_blocking=True))
                continue
            batch = chunk.map(functools.partial(self._empty, len(chunk)))
            batch.bad, done = [], 0
            while True:
                for whole, part in zip(batch.tensors(), chunk.tensors(), strict=True):
                    first = done * len(part) // len(chunk)  # an image may have several captions
                    whole[first : first + len(part)].copy_(part, non_blocking=True)
                batch.bad += chunk.bad
                done += len(chunk)
                if done == self.size:
                    break
                chunk = next(parts)
            yield batch

    def _empty(self, images: int, part: Tensor) -> Tensor:
        return torch.empty((self.size * len(part) // images, *part.shape[1:]), dtype=part.dtype, device=self.device)

    def _chunks(self, start: int, stop: int | None) -> Iterator[Batch]:
        options: dict[str, Any] = {}
        if self.workers:
            height, width = self.dataset.transform.image_size
            chunks = -(-self.size // CHUNK)
            ahead = max(2, 1 + -(-chunks // self.workers))
            fitting = MAX_AHEAD_BYTES // (self.workers * min(self.size, CHUNK) * 4 * height * width)
            options = {"prefetch_factor": max(1, min(ahead, fitting))}
        chunks_of = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_Parts(start, stop, first=self.first, size=self.size),  # type: ignore[arg-type]
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # otherwise it would draw from torch's own, and so change what comes after
            **options,
        )
        try:
            iterator = iter(chunks_of)
            take_back_signal_handler()
            for chunk in iterator:
                if isinstance(chunk, LLM2CLIPError):
                    raise chunk
                yield chunk
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LLM2CLIPError(
                f"a process that reads images died ({reason}); with too little memory, or too little shared memory "
                f"in a container (`docker run --shm-size`), take fewer {setting('workers')}"
            ) from None


class _Parts:
    """The parts of batches that one process reads, in order: a sampler for torch's DataLoader."""

    def __init__(self, start: int, stop: int | None, *, first: int, size: int) -> None:
        self.start, self.stop, self.first, self.size = start, stop, first, size

    def __iter__(self) -> Iterator[Part]:
        number = self.start
        while self.stop is None or number < self.stop:
            for place in range(self.first, self.first + self.size, CHUNK):
                yield number, place, min(place + CHUNK, self.first + self.size)
            number += 1


def one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches whose copy to the GPU began one batch earlier, on a stream of its own.

    A batch that its user has let go leaves its memory to the next one but one, so two are held and not three.
    """
    stream = torch.cuda.Stream(device)
    ready: tuple[Batch, torch.cuda.Event] | None = None
    while True:
        stream.wait_stream(torch.cuda.current_stream(device))  # what is filled now may be memory of the step before
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            copied = stream.record_event()
        if ready is not None:
            ready[1].wait(torch.cuda.current_stream(device))
            yield ready[0]
        if batch is None:
            return
        ready = batch, copied
