"""The caption loss against three lines of PyTorch, its cached form, and its mask by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm2clip.teacher.loss import CaptionLoss, false_negatives, pair_loss
from llm2clip.teacher.mixture import text_key
from llm2clip.teacher.model import llm_as_encoder
from llm2clip.teacher.tuning import add_lora

from ..student.forks import side_by_side

TEXTS = ["a red disc", "a large blue square on the left", "there is a small disc", "two plain green shape are near"]


def reference(queries: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, scale: float) -> torch.Tensor:
    texts = torch.cat([positives, negatives])
    cosine = (queries @ texts.T) / (queries.norm(dim=1)[:, None] * texts.norm(dim=1))
    return -torch.log_softmax(scale * cosine, dim=1)[range(len(queries)), range(len(queries))].mean()


def test_loss_and_gradient_equal_three_lines_of_pytorch():
    torch.manual_seed(0)
    ours = [torch.randn(5, 8, requires_grad=True) for _ in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    loss, expected = pair_loss(ours, None, scale=50.0), reference(*theirs, 50.0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_loss_by_hand():
    """Cosines 1 and 0 at scale 2: -log(e^2 / (e^2 + 1)) for both queries."""
    eye = torch.eye(2)
    loss = pair_loss([eye, eye * 3], None, scale=2.0)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(torch.tensor(-2.0))))


@pytest.mark.parametrize("columns", [2, 3])
def test_cached_gradients_equal_plain_ones(columns, llm_of):
    encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
    add_lora(encoder, rank=4, dropout=0)  # micro-batches would draw dropout in another order
    encoder.train()
    labels = torch.tensor([[*range(i * columns, (i + 1) * columns), *[i] * columns] for i in range(4)])
    grads, losses = [], []
    for micro in (None, 2, 1):
        model = copy.deepcopy(encoder)
        features = [model.preprocess(TEXTS[i:] + TEXTS[:i]) for i in range(columns)]
        loss = CaptionLoss(model, scale=50.0, micro_batch_size=micro)(features, labels)
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: w.grad for n, w in model.named_parameters() if w.grad is not None})
    assert len(grads[0]) > 0
    for other, loss in zip(grads[1:], losses[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        for name, grad in other.items():
            torch.testing.assert_close(grad, grads[0][name], rtol=1e-3, atol=1e-6)


def test_cached_backward_replays_the_dropout_of_its_forward(llm_of):
    """With dropout, the gradient must be that of the very vectors the loss was taken on."""
    encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
    add_lora(encoder, rank=4, dropout=0.5)
    encoder.train()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    seen: list[torch.Tensor] = []
    hook = encoder[1].register_forward_hook(lambda m, a, out: seen.append(out["sentence_embedding"].detach().clone()))
    features = [encoder.preprocess(TEXTS), encoder.preprocess(TEXTS[::-1])]
    CaptionLoss(encoder, micro_batch_size=2)(features, None).backward()
    hook.remove()
    forward, backward = seen[:4], seen[4:]
    assert len(backward) == 4
    for a, b in zip(forward, backward, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(seen[0], encoder(encoder.preprocess(TEXTS[:2]))["sentence_embedding"])


def test_mask_by_hand():
    a, b, c = map(text_key, ("A red disc.", "a blue square", "a red disc"))
    other = text_key("something else")
    # query key, positive key, negative key, then the images they are of
    labels = torch.tensor([[a, b, other, 0, 0, 1], [other, c, b, 1, 1, -1]])
    mask = false_negatives(labels, labels, torch.tensor([0, 1]))
    # columns: positives of 0 and 1, negatives of 0 and 1
    expected = [
        # own positive kept; "a red disc" is query 0 again; image 1 is another; "a blue square" is positive 0 again
        [False, True, False, True],
        # positive 0 is another text of another image; own positive; text and image of query 1; neither
        [False, False, True, False],
    ]
    assert mask.tolist() == expected


def test_masked_texts_do_not_push():
    torch.manual_seed(0)
    vectors = [torch.randn(3, 6) for _ in range(2)]
    same = torch.tensor([[1, 2, 0, 0], [3, 2, 1, 1], [4, 5, 2, 2]])  # queries 0 and 1 have the same positive
    scores = 50 * F.normalize(vectors[0], dim=1) @ F.normalize(vectors[1], dim=1).T
    scores[0, 1] = scores[1, 0] = -torch.inf
    expected = F.cross_entropy(scores, torch.arange(3))
    torch.testing.assert_close(pair_loss(vectors, same, scale=50.0), expected)
    assert not torch.isclose(pair_loss(vectors, None, scale=50.0), expected)


def test_cosines_are_taken_in_fp32_whatever_the_vectors_are():
    """In bf16 the cosines of near captions fall together."""
    torch.manual_seed(0)
    vectors = [torch.ones(4, 64) + 0.05 * torch.randn(4, 64) for _ in range(3)]
    half = [column.bfloat16() for column in vectors]
    loss = pair_loss(half, None, scale=50.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pair_loss([column.float() for column in half], None, scale=50.0), rtol=0, atol=0)


@pytest.mark.ci
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch takes no gradient in a fork of a process that uses a GPU")
@pytest.mark.own_process
@pytest.mark.parametrize("masked", [False, True])
def test_two_processes_with_half_a_batch_each_equal_one_with_the_whole(masked: bool, tmp_path: Path) -> None:
    """Loss and gradients, averaged over the processes as data parallelism does."""
    torch.manual_seed(0)
    whole = [torch.randn(4, 6, requires_grad=True) for _ in range(3)]
    # query 0 and the positive of 3 are one text, the negative of 1 is of image 2: pairs of different processes
    labels = torch.tensor([[5, 1, 2, 0, 0, 9], [6, 3, 4, 1, 1, 2], [7, 8, 10, 2, 2, 9], [11, 5, 12, 3, 3, -1]])

    def half(rank: int) -> None:
        own = slice(2 * rank, 2 * rank + 2)
        vectors = [column[own].detach().clone().requires_grad_() for column in whole]
        loss = pair_loss(vectors, labels[own] if masked else None, scale=7.0)
        loss.backward()
        torch.save((loss.detach(), [column.grad for column in vectors]), tmp_path / f"{rank}.pt")

    assert side_by_side(2, tmp_path / "meeting", half) == [(0, ""), (0, "")]
    loss = pair_loss(whole, labels if masked else None, scale=7.0)
    loss.backward()
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss.detach())
    for column, parts in zip(whole, zip(halves[0][1], halves[1][1], strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts) / 2, column.grad)
    if masked:
        assert not torch.isclose(loss, pair_loss(whole, None, scale=7.0))
