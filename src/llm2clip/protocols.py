"""What the scores ask of a model: two methods, so that any encoder can be scored, ours or another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


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


@runtime_checkable
class ImageTextEncoder(TextEncoder, ImageEncoder, Protocol):
    """Gives vectors of both in one space."""
