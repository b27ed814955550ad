"""What a step adds to the contrastive loss, by hand; in micro-batches as in one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig

from llm2clip.student.gradcache import cached_step
from llm2clip.student.inheritance.keep import Objective, OwnView
from llm2clip.student.loss import contrastive_loss
from llm2clip.student.model import Student, StudentModelConfig


def student() -> Student:
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return Student(
        StudentModelConfig(tower, tower_dim=16, teacher_dim=12, projection_dim=8, adaptor_blocks=1, image_size=16)
    )


def plain(model: Student, pixels: Tensor, embeds: Tensor, images: Tensor, texts: tuple[Tensor, Tensor]) -> Tensor:
    """The loss by its formula: contrastive + 0.5 x distance of images + 2 x distance of inherited captions."""
    image, text = (normalize(v, dim=-1) for v in (model.get_image_features(pixels), model.get_text_features(embeds)))
    scores = model.logit_scale.exp() * image @ text.T
    number, each = len(image), len(text) // len(image)
    own = torch.arange(len(text)) // each == torch.arange(number)[:, None]
    by_image = -(scores.log_softmax(1) * own).sum(1).mean() / each
    by_text = -(scores.log_softmax(0) * own).sum(0).mean()
    kept = (normalize(image[:, :5], dim=-1) - images).pow(2).sum(1).mean()
    said = normalize(model.get_text_features(texts[0])[:, :5], dim=-1)
    return (by_image + by_text) / 2 + 0.5 * kept + 2.0 * (said - texts[1]).pow(2).sum(1).mean()


@pytest.mark.parametrize(("size", "captions"), [(6, 1), (4, 1), (4, 2)])
def test_loss_and_gradients_are_those_of_the_formula(size: int, captions: int) -> None:
    model, other = student(), student()
    pixels, embeds = torch.rand(6, 3, 16, 16), torch.randn(6 * captions, 12)
    images = normalize(torch.randn(6, 5), dim=-1)
    texts = (torch.randn(6, 12), normalize(torch.randn(6, 5), dim=-1))
    wanted = plain(other, pixels, embeds, images, texts)
    wanted.backward()
    micro = list(zip(pixels.split(size), embeds.split(size * captions), strict=True))
    objective = Objective(contrastive_loss, micro, images=images, texts=texts, keep=0.5, keep_text=2.0)
    accelerator = SimpleNamespace(device=torch.device("cpu"), backward=lambda loss: loss.backward(), no_sync=no_sync)
    loss, vectors = cached_step(model, objective.micro_batches, objective, accelerator)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for got, expected in zip(model.parameters(), other.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        own = normalize(other.get_text_features(embeds), dim=-1)
    torch.testing.assert_close(objective.captions(vectors["text"]), own)


class no_sync:  # noqa: N801 (stands for a method)
    def __init__(self, _: nn.Module) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_nothing_is_added_where_nothing_is_kept() -> None:
    micro = [(torch.rand(2, 3, 16, 16), torch.randn(2, 12))]
    objective = Objective(contrastive_loss, micro)
    image, text, scale = student()(*micro[0])
    assert objective.micro_batches[0][1] is micro[0][1] and objective.captions(text) is text
    assert objective(image, text, scale) == contrastive_loss(image, text, scale)


def test_the_towers_own_view_stays_and_is_remembered_by_image() -> None:
    model = student().train()
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        before = normalize(model.eval().get_image_features(pixels)[:, :5], dim=-1)
    model.train()
    for remembered in (0, 9):
        view = OwnView(model, 5, num_samples=remembered)
        weights = model.tower.state_dict()
        changed = {name: value.clone() for name, value in weights.items()}
        with torch.no_grad():
            for weight in model.tower.parameters():
                weight.add_(1.0)
        torch.testing.assert_close(view(pixels, torch.tensor([4, 0, 8])), before)
        again = view(torch.zeros_like(pixels), torch.tensor([8, 4, 0]))  # other pixels under the numbers
        assert torch.allclose(again, before[[2, 0, 1]], atol=1e-3) is bool(remembered)
        model.tower.load_state_dict(changed)
    assert view._frozen.adaptor is model.adaptor and view._frozen.tower is not model.tower
    assert all(p.requires_grad for p in model.parameters()) and model.adaptor.training
