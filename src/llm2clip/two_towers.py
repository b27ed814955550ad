"""Models of two towers for transformers (CLIP, SigLIP and their kin): images and captions as they were trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from llm2clip.data.images import load_image
from llm2clip.errors import UsageError, setting
from llm2clip.hub import ModelFolder, cast, find_model, listed, one_line_errors

logger = logging.getLogger("llm2clip")


class ClipEncoder:
    """A two-tower model of transformers (CLIP, SigLIP, SigLIP 2, ...), captions prepared as it was trained.

    SigLIP models were trained on lower-case text padded to a fixed length, without an attention mask: anything else
    costs them tens of points. Captions longer than the model's context are cut, and counted in `num_cut`.

    Args:
        model: with `get_image_features` and `get_text_features`.
        tokenizer: its tokenizer.
        processor: its image processor.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.fixed_length = model.config.model_type.startswith("siglip")
        text = getattr(model.config, "text_config", model.config)
        self.context = min(int(getattr(text, "max_position_embeddings", 77)), tokenizer.model_max_length)
        self.num_cut = 0

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | ModelFolder,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> ClipEncoder:
        """Load a model's folder or Hub id.

        Raises:
            UsageError: if it does not encode both images and texts.
        """
        from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

        folder = find_model(name)
        options = {"trust_remote_code": trust_remote_code}
        with one_line_errors(f"{setting('model')} {folder.name} cannot be loaded and run"):
            config = AutoConfig.from_pretrained(folder.path, **options)
            _check_two_towers(MODEL_MAPPING.get(type(config), None), folder)
            model, report = AutoModel.from_pretrained(
                folder.path, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **options
            )
            _check_two_towers(type(model), folder)
            if report["missing_keys"]:
                raise UsageError(
                    f"{setting('model')} {folder.name} lacks weights, such as {sorted(report['missing_keys'])[0]}"
                )
            say_left_out(folder, report["unexpected_keys"])
            tokenizer = AutoTokenizer.from_pretrained(folder.path, **options)
            processor = AutoImageProcessor.from_pretrained(folder.path, **options)
            encoder = cls(cast(model, torch.device(device), dtype), tokenizer, processor)
            encoder.encode_image([Image.new("RGB", (64, 64))])  # some want more than pixels and tokens
            encoder.encode_text(["a"])
        return encoder

    def prepare_image(self, image: Any) -> Tensor:
        """The normalised pixels [3, H, W] of an image."""
        if isinstance(image, Tensor):
            return image
        pixels: Tensor = self.processor(images=load_image(image), return_tensors="pt")["pixel_values"]
        return pixels[0]

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length."""
        parts = [np.empty((0, 1), np.float32)]
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([self.prepare_image(image) for image in images[start : start + batch_size]])
            parts.append(self._unit(self.model.get_image_features(pixels.to(self.model.device, self.model.dtype))))
        return np.concatenate(parts[1:] or parts)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length."""
        parts = [np.empty((0, 1), np.float32)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokens(texts[start : start + batch_size])
            parts.append(self._unit(self.model.get_text_features(**tokens)))
        return np.concatenate(parts[1:] or parts)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text tower reads of `texts`."""
        texts = [text.lower() for text in texts] if self.fixed_length else list(texts)
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        self.num_cut += sum(length > self.context for length in lengths)
        tokens = self.tokenizer(
            texts,
            padding="max_length" if self.fixed_length else True,
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        kept = ("input_ids",) if self.fixed_length else ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.model.device) for name in kept}

    def _unit(self, features: Any) -> np.ndarray:
        vectors: Tensor = features if isinstance(features, Tensor) else features.pooler_output
        return normalize(vectors.float(), dim=-1).cpu().numpy()


def say_left_out(folder: ModelFolder, names: Iterable[str]) -> None:
    """Name in the log the weights of another's model that its class has no place for."""
    if left := listed(names):
        logger.info("%s %s: of its weights are left out: %s", setting("model"), folder.name, left)


def _check_two_towers(model_class: Any, folder: ModelFolder) -> None:
    """Raise if `model_class` is known and does not encode both; asked before the weights are loaded, and after."""
    needed = ("get_image_features", "get_text_features")
    if model_class is not None and not all(hasattr(model_class, name) for name in needed):
        name = getattr(model_class, "__name__", str(model_class))
        raise UsageError(
            f"{setting('model')} {folder.name} is a {name}, which does not encode images and texts into one space; "
            f"give a student, a CLIP or SigLIP (or a text encoder alone as {setting('teacher')})"
        )
