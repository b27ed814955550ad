"""A student and its teacher for code that was written for open_clip: a model, how it wants images, a tokenizer.

`export --to open-clip` writes what open_clip itself opens, the image half; here texts come with it.

Letters: B images or texts, D shared width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize as unit

from llm2clip.pipeline import LLM2CLIP


class Texts(list[str]):
    """What the tokenizer gives: the texts themselves, as the teacher has a tokenizer of its own."""

    def to(self, *args: Any, **kwargs: Any) -> Texts:
        """Itself: nothing lies on a device yet."""
        return self


class OpenClipModel(torch.nn.Module):
    """An `LLM2CLIP` with the methods of open_clip's models.

    Attributes:
        llm2clip: what it is made of.
        logit_scale: its log, [1]; `model.logit_scale.exp()` as there.
    """

    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.llm2clip, self.student = model, model.student
        self.logit_scale = model.student.logit_scale

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """float32 [B, D] of images [B, 3, H, W] as `preprocess` gives them."""
        vectors: Tensor = self.student.get_image_features(image.to(self.llm2clip.device)).float()
        return unit(vectors, dim=-1) if normalize else vectors

    def encode_text(self, text: Sequence[str], normalize: bool = False) -> Tensor:
        """float32 [B, D] of texts, of unit length in any case; the teacher takes no gradient."""
        return torch.from_numpy(self.llm2clip.encode_text(text)).to(self.llm2clip.device)

    def forward(self, image: Tensor, text: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Images and texts, both of unit length, and the scale of their cosines."""
        scale = self.logit_scale.float().exp()
        return self.encode_image(image, normalize=True), self.encode_text(text, normalize=True), scale


def load(
    name: str | Path, teacher: str | Path | None = None, **options: Any
) -> tuple[OpenClipModel, Callable[[Image.Image], Tensor], Callable[[str | Sequence[str]], Texts]]:
    """A model, the preparation of an image [3, H, W], and a tokenizer, in evaluation mode.

    Args:
        name: a student, an exported bundle, or a released student; a folder or Hub id.
        teacher: of a student that does not bring or know its own; without it there are images alone.
        options: as `LLM2CLIP.from_pretrained` takes them (`device`, `dtype`, ...).

    Example:
        >>> model, preprocess, tokenizer = load("bundle")                               # doctest: +SKIP
        >>> image = model.encode_image(preprocess(Image.open("cat.jpg"))[None], normalize=True)   # doctest: +SKIP
        >>> text = model.encode_text(tokenizer(["a grey cat", "a dog"]))                # doctest: +SKIP
    """
    model = LLM2CLIP.from_pretrained(name, teacher, **options)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.transform.mean, model.transform.std))

    def preprocess(image: Image.Image) -> Tensor:
        return (model.prepare_image(image) / 255 - mean) / std

    def tokenizer(texts: str | Sequence[str]) -> Texts:
        return Texts([texts] if isinstance(texts, str) else texts)

    return OpenClipModel(model).eval(), preprocess, tokenizer
