"""What scores ask of a model, and what asks: any encoder can be scored, by any evaluator.

An evaluator holds its own data and knows nothing of where a model comes from: `evaluate` runs it on models that are
finished, training on the student as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class TextEncoder(Protocol):
    """Gives vectors of captions."""

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length, one row a caption."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """Gives vectors of images."""

    def prepare_image(self, image: Any) -> Any:
        """What the model needs of an image (a path, encoded bytes, a place in a file, a Pillow image): its pixels.

        Called from several threads.

        Raises:
            BadImage: if it cannot be read.
        """
        ...

    def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length, one row an image, prepared or not."""
        ...


class Captioned(Protocol):
    """An image and its captions: a sample of a source, or a row of a bank."""

    @property
    def id(self) -> str:
        """Its name, for messages."""
        ...

    @property
    def image(self) -> Any:
        """What the model's `prepare_image` takes."""
        ...

    @property
    def captions(self) -> Mapping[str, Sequence[Any]]:
        """Kind -> captions of that kind, as the encoder takes them."""
        ...


class Encoder(Protocol):
    """A model as an evaluator sees it: batches, bad images and processes are the encoder's own business."""

    def images(self, samples: Sequence[Any]) -> tuple[list[int], Tensor]:
        """The numbers of those samples whose image can be read, and their vectors [n, D]."""
        ...

    def texts(self, texts: Sequence[Any]) -> Tensor:
        """[N, D], a row a text."""
        ...


class Score(NamedTuple):
    """What an evaluator found."""

    name: str
    """Such as "short/i2t_r@1"."""
    value: float
    """A fraction between 0 and 1; more is better."""
    chance: float | None = None
    """What a model that knows nothing would get, where that is known."""
    num_images: int | None = None
    """Of how many images it is a share: what an interval is made of."""
    shares: tuple[np.ndarray, np.ndarray] | None = None
    """By image what counts and out of how much, [N] each: the value is the one's sum by the other's."""


class Evaluator(Protocol):
    """Scores a model on the data that it holds.

    Example:
        >>> class Constant:
        ...     def run(self, encoder):
        ...         yield Score("constant", 0.5, chance=0.1)
        >>> dict((name, value) for name, value, *_ in Constant().run(None))
        {'constant': 0.5}
    """

    def run(self, encoder: Encoder) -> Iterator[Score]:
        """Its scores, each by a name that no other of its scores has."""
        ...
