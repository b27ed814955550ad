"""llm2clip.open_clip: code that was written for open_clip gets the vectors that LLM2CLIP gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip import LLM2CLIP
from llm2clip.errors import UsageError
from llm2clip.export.check import probe_images
from llm2clip.open_clip import load

TEXTS = ["a red disc", "a small blue square on the left"]


def test_images_texts_and_scale_are_those_of_the_model(finished_student: Path, finished_teacher: Path) -> None:
    plain = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    model, preprocess, tokenizer = load(finished_student, finished_teacher, device="cpu")
    pixels = torch.stack([preprocess(image) for image in probe_images()])
    assert pixels.dtype == torch.float32 and pixels.shape[1:] == (3, 32, 32)
    with torch.no_grad():
        image, text, scale = model(pixels.to("cpu"), tokenizer(TEXTS).to("cpu"))
        longer = model.encode_image(pixels)
    np.testing.assert_allclose(image, plain.encode_image(probe_images()), atol=1e-5)
    np.testing.assert_allclose(text, plain.encode_text(TEXTS), atol=1e-6)
    np.testing.assert_allclose(longer / longer.norm(dim=-1, keepdim=True), image, atol=1e-6)
    assert (longer.norm(dim=-1) - 1).abs().min() > 0.01
    assert scale.item() == pytest.approx(plain.student.logit_scale.exp().item()) and not model.training
    np.testing.assert_allclose(model.encode_text(tokenizer(TEXTS[0])), text[:1], atol=1e-6)
    image_half, *_ = load(finished_student, device="cpu")
    with pytest.raises(UsageError, match="opened without its teacher"):
        image_half.encode_text(tokenizer(TEXTS))


def test_open_clips_own_zero_shot_loop_takes_it(finished_student: Path, finished_teacher: Path) -> None:
    zero_shot = pytest.importorskip("open_clip", reason="pip install 'llm2clip[metrics]'").build_zero_shot_classifier
    plain = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    model, _, tokenizer = load(finished_student, finished_teacher, device="cpu")
    classes, templates = ["red disc", "blue square", "yellow disc"], ["a {}.", "the image shows a {}"]
    found = zero_shot(model, tokenizer, classes, [each.format for each in templates], num_classes_per_batch=2)
    for column, name in zip(found.T, classes, strict=True):
        mean = plain.encode_text([each.format(name) for each in templates]).mean(0)
        np.testing.assert_allclose(column, mean / np.linalg.norm(mean), atol=1e-5)
