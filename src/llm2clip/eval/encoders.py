"""Other people's models as encoders: SentenceTransformers that take images; CLIPs are in `llm2clip.two_towers`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llm2clip.data.images import load_image
from llm2clip.errors import UsageError, setting
from llm2clip.hub import ModelFolder, cast, compare_weights, find_model, one_line_errors
from llm2clip.two_towers import say_left_out


class SentenceTransformerEncoder:
    """A SentenceTransformer that encodes texts and images.

    Args:
        model: loaded.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | ModelFolder,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> SentenceTransformerEncoder:
        """Load a model's folder or Hub id.

        Raises:
            UsageError: if it does not encode images.
        """
        from sentence_transformers import SentenceTransformer

        folder = find_model(name)
        with one_line_errors(f"{setting('model')} {folder.name} cannot be loaded"):
            model = SentenceTransformer(
                str(folder.path),
                device=str(device),
                trust_remote_code=trust_remote_code,
                model_kwargs={"use_safetensors": True, **({"dtype": dtype} if dtype is not None else {})},
            )
            missing, left = compare_weights(model, folder.path)
        say_left_out(folder, left)
        if missing:
            raise UsageError(f"{setting('model')} {folder.name} lacks weights, such as {missing[0]}")
        if "image" not in model.modalities:
            raise UsageError(f"{setting('model')} {folder.name} encodes texts only; give it as {setting('teacher')}")
        return cls(cast(model, torch.device(device), dtype))

    def prepare_image(self, image: Any) -> Image.Image:
        """The image decoded, RGB."""
        return load_image(image)

    def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length."""
        return self._encode([self.prepare_image(image) for image in images], batch_size)

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length."""
        return self._encode(list(texts), batch_size)

    def _encode(self, inputs: list[Any], batch_size: int) -> np.ndarray:
        vectors = self.model.encode(inputs, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True)
        return np.asarray(vectors, dtype=np.float32)
