"""The tiled loss against a dense one, in value and in every gradient; on one process and across processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from llm2clip.errors import UsageError
from llm2clip.student.config import LOSSES
from llm2clip.student.loss import KINDS, contrastive_loss

DIM = 16


def dense_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
    rows: Tensor | None = None,
) -> Tensor:
    """What `contrastive_loss` should give, with all matrices whole."""
    scores = scale * image @ text.T
    owner = torch.arange(len(text)) // (len(text) // len(image))
    own = owner == torch.arange(len(image))[:, None]
    ignored = own.new_zeros(own.shape)
    if rows is not None:
        ignored = torch.stack([torch.isin(rows, rows[owner == i]) for i in range(len(image))]) & ~own
    if kind == "sigmoid":
        assert bias is not None
        pairs = logsigmoid(torch.where(own, scores + bias, -scores - bias))
        return -pairs.masked_fill(ignored, 0).sum() / len(text)
    losses = []
    for dim in (1, 0):
        log_p = scores.masked_fill(ignored, -torch.inf).log_softmax(dim).masked_fill(ignored, 0)
        hard, even = (part / part.sum(dim, keepdim=True) for part in (own.to(scores), (~ignored).to(scores)))
        target = (1 - label_smoothing) * hard + label_smoothing * even
        losses.append(-(target * log_p).sum(dim).mean())
    return (losses[0] + losses[1]) / 2


def batch(b: int, m: int = 1, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Vectors of b images and b * m captions, and bank rows with repetitions."""
    torch.manual_seed(seed)
    return {
        "image": normalize(torch.randn(b, DIM, dtype=dtype), dim=1),
        "text": normalize(torch.randn(b * m, DIM, dtype=dtype), dim=1),
        "scale": torch.tensor(14.0, dtype=dtype),
        "bias": torch.tensor(-2.0, dtype=dtype),
        "rows": torch.randint(2 * b, (b * m,)),
    }


def gradients(loss: Any, data: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The loss and its derivatives by image, text, scale (and bias), from fresh leaves."""
    names = ["image", "text", "scale"] + (["bias"] if options.get("kind") == "sigmoid" else [])
    leaves = {name: data[name].clone().requires_grad_() for name in names}
    image, text, scale = leaves["image"], leaves["text"], leaves["scale"]
    bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
    extra = {name: data[name] for name in options.get("given", ())}
    rest = {key: value for key, value in options.items() if key != "given"}
    value = loss(image, text, scale, **bias, **extra, **rest)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves.values()]


def assert_close(got: Tensor, wanted: Tensor, *, relative: float = 1e-5) -> None:
    error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12)
    assert error < relative, f"relative error {error:.2e}"


OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"kind": "sigmoid"},
    "smoothing": {"label_smoothing": 0.1},
    "identical ignored": {"given": ("rows",)},
    "identical ignored, sigmoid": {"given": ("rows",), "kind": "sigmoid"},
    "identical ignored, smoothing": {"given": ("rows",), "label_smoothing": 0.1},
}


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tiled_equals_dense(options: dict[str, Any], m: int) -> None:
    data = batch(23, m)
    wanted, wanted_gradients = gradients(dense_loss, data, options)
    for tile in (5, 8, 1000):
        value, got = gradients(contrastive_loss, data, {**options, "tile": tile})
        assert_close(value, wanted)
        for gradient, wanted_gradient in zip(got, wanted_gradients, strict=True):
            assert_close(gradient, wanted_gradient)


def test_by_hand() -> None:
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Scores with scale 1: [[1, 0.6], [0, 0.8]].
    rows = -torch.tensor([1.0, 0.6]).log_softmax(0)[0] - torch.tensor([0.0, 0.8]).log_softmax(0)[1]
    columns = -torch.tensor([1.0, 0.0]).log_softmax(0)[0] - torch.tensor([0.6, 0.8]).log_softmax(0)[1]
    loss = contrastive_loss(image, text, torch.tensor(1.0))
    torch.testing.assert_close(loss, (rows + columns) / 4)
    sigmoid = contrastive_loss(image, text, torch.tensor(1.0), kind="sigmoid", bias=torch.tensor(0.0))
    pairs = logsigmoid(torch.tensor([1.0, -0.6, -0.0, 0.8]))
    torch.testing.assert_close(sigmoid, -pairs.sum() / 2)


def test_label_smoothing_is_that_of_torch() -> None:
    data = batch(9)
    scores = data["scale"] * data["image"] @ data["text"].T
    target = torch.arange(9)
    wanted = sum(cross_entropy(s, target, label_smoothing=0.2) for s in (scores, scores.T)) / 2
    got = contrastive_loss(data["image"], data["text"], data["scale"], label_smoothing=0.2, tile=4)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradcheck_in_double(kind: str) -> None:
    data = batch(5, 2, dtype=torch.float64)
    bias = data["bias"].requires_grad_() if kind == "sigmoid" else None
    inputs = [data[name].requires_grad_() for name in ("image", "text", "scale")]
    assert torch.autograd.gradcheck(
        lambda image, text, scale, bias: contrastive_loss(image, text, scale, bias=bias, kind=kind, tile=3),
        (*inputs, bias),
    )


@pytest.mark.parametrize("scale", [1.0, 100.0, 3000.0])
def test_extreme_scores_stay_exact(scale: float) -> None:
    """Scores of +-3000 over- and underflow any exponential that is not shifted."""
    data = {**batch(12), "scale": torch.tensor(scale)}
    wanted, wanted_gradients = gradients(dense_loss, data, {})
    value, got = gradients(contrastive_loss, data, {"tile": 5})
    assert_close(value, wanted)
    for gradient, wanted_gradient in zip(got, wanted_gradients, strict=True):
        assert_close(gradient, wanted_gradient, relative=1e-4 if scale > 100 else 1e-5)


def test_a_loss_near_zero_is_as_exact_as_the_dense_one() -> None:
    """Scores of 20 beside a loss of 2e-4: a log-sum-exp held as one number would round it away."""
    torch.manual_seed(0)
    image = normalize(torch.randn(64, 32), dim=1)
    data = {"image": image, "text": normalize(image + 0.5 * normalize(torch.randn(64, 32), dim=1), dim=1)}
    exact = {name: value.double() for name, value in data.items()} | {"scale": torch.tensor(20.0).double()}
    wanted, wanted_gradients = gradients(dense_loss, exact, {})
    value, got = gradients(contrastive_loss, {**data, "scale": torch.tensor(20.0)}, {"tile": 20})
    assert wanted < 1e-3
    assert_close(value, wanted, relative=1e-3)
    for gradient, wanted_gradient in zip(got, wanted_gradients, strict=True):
        assert_close(gradient, wanted_gradient, relative=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_with_in_fp32(dtype: torch.dtype) -> None:
    data = batch(20)
    short = {**data, "image": data["image"].to(dtype), "text": data["text"].to(dtype)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, (image, text, _) = gradients(contrastive_loss, short, {"tile": 8})
    wanted, (wanted_image, wanted_text, _) = gradients(
        dense_loss, {**data, "image": short["image"].float(), "text": short["text"].float()}, {}
    )
    assert_close(value, wanted)
    assert image.dtype == text.dtype == dtype
    assert_close(image, wanted_image.to(dtype))
    assert_close(text, wanted_text.to(dtype))


def test_a_part_without_gradient_gets_none() -> None:
    data = batch(6)
    image = data["image"].requires_grad_()
    loss = contrastive_loss(image, data["text"], data["scale"])
    (2 * loss).backward()
    doubled = image.grad
    image.grad = None
    contrastive_loss(image, data["text"], data["scale"]).backward()
    torch.testing.assert_close(doubled, 2 * image.grad)
    assert data["text"].grad is None
    assert not contrastive_loss(image.detach(), data["text"], data["scale"]).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hinge"}, "loss kind is 'hinge'"),
        ({"kind": "sigmoid"}, "needs a bias"),
        ({"bias": torch.tensor(1.0)}, "does not depend on a bias"),
        ({"kind": "sigmoid", "bias": torch.tensor(0.0), "label_smoothing": 0.1}, "is for kind='softmax'"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"rows": torch.arange(3)}, "rows has 3 entries for 6 captions"),
        ({"image": torch.eye(4, DIM)}, "the same number of captions"),
        ({"image": torch.eye(6, 3)}, "must be"),
    ],
)
def test_wrong_options_are_named(change: dict[str, Any], message: str) -> None:
    data = batch(6)
    arguments = {name: data[name] for name in ("image", "text", "scale")} | change
    with pytest.raises(UsageError, match=message):
        contrastive_loss(**arguments)


# --- several processes -------------------------------------------------------------------------------------------

NUM_IMAGES = 12
"""On all processes together."""


def _shard(data: dict[str, Tensor], world_size: int, rank: int) -> dict[str, Tensor]:
    return {
        name: value.chunk(world_size)[rank] if name in ("image", "text", "rows") else value
        for name, value in data.items()
    }


def _process(folder: str, rank: int) -> None:
    """What each of three processes does; the first two do it once more, without the third."""
    results = {}
    for world_size in range(3, max(rank, 1), -1):
        dist.init_process_group("gloo", f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size)
        for name, options in OPTIONS.items():
            for m in (1, 2):
                mine = _shard(batch(NUM_IMAGES, m), world_size, rank)
                results[world_size, name, m] = gradients(contrastive_loss, mine, {**options, "tile": 5})
        for images, captions in ((4, 4 + 4 * rank), (4 + rank, 4 + rank), (4 * rank, 4 * rank)):
            with pytest.raises(UsageError, match=r"\(by process\); every process needs the same number"):
                contrastive_loss(torch.ones(images, DIM), torch.ones(captions, DIM), torch.tensor(1.0))
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(folder), str(rank)] for rank in range(3)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait() for process in processes] == [0, 0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_equal_one(results: list[dict[Any, Any]], world_size: int, name: str, m: int) -> None:
    """The loss is equal on all; gradients by rows are W times, scale's and bias's average to, those of one process."""
    wanted, (image, text, *scalars) = gradients(dense_loss, batch(NUM_IMAGES, m), OPTIONS[name])
    values, parts = zip(*(results[rank][world_size, name, m] for rank in range(world_size)), strict=True)
    for value in values:
        assert_close(value, wanted)
    assert_close(torch.cat([part[0] for part in parts]) / world_size, image)
    assert_close(torch.cat([part[1] for part in parts]) / world_size, text)
    for place, scalar in enumerate(scalars, start=2):
        assert_close(torch.stack([part[place] for part in parts]).mean(), scalar)


def test_the_settings_offer_every_loss() -> None:
    assert tuple(KINDS) == LOSSES


if __name__ == "__main__":
    _process(sys.argv[1], int(sys.argv[2]))
