"""Images made ready by threads ahead of the model that reads them: for `LLM2CLIP`, `evaluate`, and validation.

Training has processes instead (`student/loader.py`): what of an image's work holds the interpreter would take it from
the thread that drives the GPU.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from llm2clip.data.bad import BadImage, BadSamples
from llm2clip.protocols import Captioned, ImageEncoder

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S", bound=Captioned)
THREADS = min(8, os.cpu_count() or 1)
"""Decoding and resizing let go of the interpreter, so this many images come at once."""


def prepared(
    items: Iterable[T], prepare: Callable[[T], R], *, ahead: int, threads: int = THREADS
) -> Iterator[tuple[T, Future[R]]]:
    """Each item with the future of what `prepare` makes of it, in the order of the items.

    Args:
        ahead: items taken, and prepared by `threads`, beyond the one that is handed out.

    >>> [(item, future.result()) for item, future in prepared("ab", str.upper, ahead=5)]
    [('a', 'A'), ('b', 'B')]
    """
    left = iter(items)
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for item in itertools.islice(left, ahead + 1 - len(waiting)):
                waiting.append((item, pool.submit(prepare, item)))
            if not waiting:
                return
            yield waiting.popleft()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`size` items after another, at the end what is left.

    >>> list(batched("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch


def encoded(
    samples: Iterable[S], encoder: ImageEncoder, *, batch_size: int, bad: BadSamples, threads: int = THREADS
) -> Iterator[tuple[list[S], np.ndarray]]:
    """Batches of the samples whose image can be read, with the images' vectors [n, D]; the others are added to `bad`.

    Raises:
        TooManyBadSamples: if too many cannot be read.
    """
    for batch in batched(_readable(samples, encoder, bad, ahead=batch_size, threads=threads), batch_size):
        yield (
            [sample for sample, _ in batch],
            encoder.encode_image([image for _, image in batch], batch_size=batch_size),
        )


def _readable(
    samples: Iterable[S], encoder: ImageEncoder, bad: BadSamples, *, ahead: int, threads: int
) -> Iterator[tuple[S, Any]]:
    """The samples with their images as the encoder needs them."""
    images = prepared(samples, lambda sample: encoder.prepare_image(sample.image), ahead=ahead, threads=threads)
    for number, (sample, image) in enumerate(images, start=1):
        try:
            pixels = image.result()
        except BadImage as error:
            bad.add(sample.id, error.cause, error.detail)
            bad.check(number, final=False)
        else:
            yield sample, pixels
