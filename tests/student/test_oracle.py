"""What a run learns with each setting, step by step, is what the oracle learns: plain PyTorch beside it.

Tolerances. The runs compute in float32, and only the order of sums differs from the oracle's: losses and norms agree to
1e-5. AdamW divides a gradient by its own size, so one that is rounding alone (a key's bias: it moves all scores of a
query alike) becomes a whole step of noise. Gradients are therefore clipped to a norm at which such noise is far below
AdamW's epsilon, 1e-8, and no weight has to be left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llm2clip.bank.reader import Bank
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.student import train
from llm2clip.student.config import StudentConfig
from llm2clip.student.data import BankDataset
from llm2clip.student.model import Student
from llm2clip.student.start import open_transform, start_student

from .banks import DIM, log, write_test_bank
from .oracle import Oracle

BASE: dict[str, Any] = {
    "steps": 3,
    "batch_size": 8,
    "dim": 16,
    "adaptor_blocks": 2,
    "learning_rate": 1e-2,
    "adaptor_learning_rate": 3e-3,
    "max_grad_norm": 1e-4,
    "workers": 0,
    "precision": "fp32",
    "tracker": "none",
}
SETTINGS: list[dict[str, Any]] = [
    {"init": "random"},
    {"image_size": 48},
    {"dim": 8},
    {"adaptor_blocks": 1},
    {"mix": {"long": 1.0}},
    {"mix": {"short": 0.2, "long": 0.8}, "seed": 3},
    {"captions_per_image": 2},
    {"captions_per_image": 2, "loss": "sigmoid", "micro_batch_size": 3},
    {"bank_weights": (1.0, 3.0)},
    {"bank_weights": (0.0, 1.0), "captions_per_image": 3, "batch_size": 6},
    {"min_crop": 1.0},
    {"min_crop": 0.3},
    {"label_smoothing": 0.3},
    {"label_smoothing": 0.3, "captions_per_image": 2},
    {"steps": None, "epochs": 1.5, "accumulate": 2, "batch_size": 4},
    {"steps": None, "epochs": 2, "batch_size": 16},
    {"batch_size": 5},
    {"micro_batch_size": 3},
    {"accumulate": 2},
    {"optimizer": "muon"},
    {"learning_rate": 3e-2},
    {"adaptor_learning_rate": 3e-2},
    {"warmup_steps": 2, "steps": 4},
    {"adaptor_warmup_steps": 1},
    {"adaptor_warmup_steps": 2, "unlocked_blocks": 1, "weight_decay": 0.5},
    {"adaptor_warmup_steps": 1, "lora_rank": 2},
    {"weight_decay": 2.0},
    {"layer_decay": 0.5},
    {"max_grad_norm": 1e-5},
    {"unlocked_blocks": 0, "patch_dropout": 0.4},
    {"unlocked_blocks": 1, "optimizer": "muon"},
    {"lora_rank": 2},
    {"lora_rank": 3, "lora_alpha": 5, "accumulate": 2},
    {"patch_dropout": 0.4},
    {"patch_dropout": 0.75, "micro_batch_size": 3, "accumulate": 2, "seed": 7},
    {"ema": 0.15},
    {"ema": 0.9, "adaptor_warmup_steps": 1},
    {"seed": 2**62},
    {"precision": "bf16"},
    {"gradient_checkpointing": True, "patch_dropout": 0.4, "micro_batch_size": 4},
]
NUM_IMAGES = 16
ELSEWHERE = {
    "bank": "every run has two; what a bank's vectors are is held by the tests of the bank",
    "tower": "test_every_family_learns_what_the_oracle_does",
    **dict.fromkeys(("inherit", "inherit_kinds", "inherit_bank", "inherit_cache"), "inheritance/test_inherit.py"),
    "inherit_noise": "inheritance/test_inherit.py",
    **dict.fromkeys(("keep", "keep_text"), "inheritance/test_keep.py"),
    "tower_revision": "test_session.py: it picks among the commits of a tower on the Hub",
    "out": "where, not what",
    "max_bad_fraction": "test_train.py: it stops runs",
    "val_bank": "test_session.py: it picks among the weights of a run",
    "val_every": "test_session.py, as --val-bank",
    **dict.fromkeys(("val", "val_root", "val_score"), "test_validate.py"),
    "patience": "test_session.py: it stops runs",
    "compile": "test_compile.py",
    "workers": "test_train.py: test_what_only_changes_speed_changes_nothing_else",
    "save_every": "test_train.py: test_what_only_changes_speed_changes_nothing_else",
    "tracker": "test_train.py, where curves go",
}


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two banks of noise; every two images share their short caption, and each has two long ones of its own."""
    folder, random, folders = tmp_path_factory.mktemp("oracle"), np.random.default_rng(0), []
    for name, count in (("a", 10), ("b", 6)):
        samples = []
        for i in range(count):
            path = folder / f"{name}{i}.png"
            Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
            captions = {"short": (f"{name} {i // 2}",), "long": (f"{name} {i} long", f"{name} {i} longer")}
            samples.append(Sample(f"{name}{i}", ImageRef(str(path)), captions))
        folders.append(str(write_test_bank(folder / name, samples).folder))
    return folders[0], folders[1]


@dataclasses.dataclass
class Watched:
    """What a run did."""

    config: StudentConfig
    batches: list[list[Any]] = dataclasses.field(default_factory=list)
    rates: list[dict[str, float]] = dataclasses.field(default_factory=list)
    start: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def saved(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in Student.from_pretrained(self.config.out).named_parameters()}

    def oracle(self) -> Oracle:
        """Ready to take the same steps, from weights that it makes itself; only LoRA's draws are the run's."""
        config = self.config
        torch.manual_seed(config.seed)
        student = start_student(
            config.tower,
            teacher_dim=DIM,
            projection_dim=config.dim,
            adaptor_blocks=config.adaptor_blocks,
            loss=config.loss,
            image_size=config.image_size,
            init=config.init,
        )
        adapters = {plain(name): value for name, value in self.start.items() if "lora_" in name}
        layers = {name.rpartition(".")[0] for name in adapters}
        assert all((adapters[f"{layer}.lora_B"] == 0).all() for layer in layers), "adapters begin as nothing"
        return Oracle(student, config, len(self.batches), adapters)


def plain(name: str) -> str:
    """The oracle's name of a weight of the run's."""
    return name.replace(".default.weight", "").replace(".base_layer", "")


@pytest.fixture
def watch(banks, tiny_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """A function from settings to a run with them, and what it did; `begin` may change the student before it."""

    def run(*, begin: Callable[[Any], None] = lambda student: None, **settings: Any) -> Watched:
        config = StudentConfig(**{"bank": banks, "tower": str(tiny_tower), "out": tmp_path / "out", **BASE, **settings})
        seen, real = Watched(config), train.train_step

        def step(session: Any, batches: list[Any]) -> Any:
            named = {plain(name): p for name, p in session.student.named_parameters()}
            if not seen.batches:
                begin(session.student)
                seen.start = {name: p.detach().clone() for name, p in session.student.named_parameters()}
            names = {p: name for name, p in named.items()}
            seen.batches.append(list(batches))
            values = real(session, batches)
            groups = session.optimizer.param_groups
            seen.rates.append({names[p]: group["lr"] for group in groups for p in group["params"]})
            return values

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", step)
            train.train_student(config)
        return seen

    return run


def compare(seen: Watched, oracle: Oracle, *, exact: float = 1e-5, weights: float = 3e-4) -> list[dict[str, Any]]:
    """Hold each step of a run against the oracle's, and then the weights it leaves; what the oracle has of each step.

    Args:
        exact: relative error allowed of losses, norms and the scale.
        weights: error allowed of a tensor, root mean square, in steps of AdamW at its peak rate.
    """
    lines, steps = log(seen.config.out), []
    assert len(lines) == len(seen.batches)
    for line, batches, rates in zip(lines, seen.batches, seen.rates, strict=True):
        wanted = oracle.step(batches)
        for name in ("loss", "grad_norm", "scale"):
            assert line[name] == pytest.approx(wanted[name], rel=exact), f"{name} at step {line['step']}"
        assert wanted["accuracy_least"] - 1e-6 <= line["accuracy"] <= wanted["accuracy_most"] + 1e-6
        assert rates == pytest.approx({name: wanted["rates"][name] for name in rates}, rel=1e-9, abs=1e-12)
        steps.append(wanted)
    saved, got = oracle.saved(), seen.saved
    assert got.keys() == saved.keys()
    for name, value in saved.items():
        if not value.numel() or (seen.config.max_grad_norm > 1 and name.endswith("k_proj.bias")):
            continue  # no register tokens; rounding alone
        error = (got[name] - value).square().mean().sqrt().item() / oracle.rate(name)
        assert error <= weights, f"{name} is {error} steps away"
    return steps


def test_a_plain_run_is_the_oracle_s(watch) -> None:
    seen = watch()
    compare(seen, seen.oracle())
    rows = [batch.rows.tolist() for batches in seen.batches for batch in batches]
    assert any(len(set(each)) < len(each) for each in rows), "equal captions, which must not be taken for wrong ones"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_learns_what_the_oracle_does(watch, settings) -> None:
    seen = watch(**settings)
    config = seen.config
    compare(seen, seen.oracle(), **({"exact": 1e-3, "weights": 0.03} if config.precision == "bf16" else {}))
    passes = 4 if config.epochs is None else config.epochs
    assert len(seen.batches) == (config.steps or passes * (NUM_IMAGES // config.batch_size) / config.accumulate)
    dataset = BankDataset(
        [Bank.open(folder) for folder in config.bank],
        transform=open_transform(config.tower, image_size=config.image_size),
        batch_size=config.batch_size,
        seed=config.seed,
        mix=config.mix,
        captions_per_image=config.captions_per_image,
        bank_weights=config.bank_weights,
        min_crop=config.min_crop,
    )
    taken = [batch for batches in seen.batches for batch in batches]
    assert [len(batches) for batches in seen.batches] == [config.accumulate] * len(seen.batches)
    for number, batch in enumerate(taken):
        wanted = dataset[number, 0, config.batch_size]
        for name in ("pixels", "text_embeds", "rows", "samples"):
            assert torch.equal(getattr(batch, name), getattr(wanted, name)), name


def test_no_setting_is_forgotten() -> None:
    """A new field must be held by the oracle, or be here with the reason why not."""
    held = {name for settings in SETTINGS for name in settings}
    assert not held & set(ELSEWHERE)
    assert {field.name for field in dataclasses.fields(StudentConfig)} == held | set(ELSEWHERE)


@pytest.mark.parametrize(("start", "bound"), [(0.99, 1.0), (101.0, 100.0)])
def test_the_scale_stays_in_its_bounds(watch, start, bound) -> None:
    """A step moves the scale by 0.3 %, so from 1 % outside it would stay outside, whichever way it goes.

    The average follows the scale within its bounds.
    """
    begin = lambda student: student.logit_scale.data.fill_(math.log(start))  # noqa: E731
    seen = watch(begin=begin, batch_size=2, steps=2, ema=0.5)
    oracle = seen.oracle()
    oracle.weights["logit_scale"].data.fill_(math.log(start))
    first, second = compare(seen, oracle)
    assert second["scale"] == pytest.approx(bound) and not 1 <= first["unclamped"] <= 100


def test_gradients_are_only_scaled_down(watch) -> None:
    seen = watch(max_grad_norm=100.0)
    steps = compare(seen, seen.oracle())
    assert max(step["grad_norm"] for step in steps) < 100


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "dinov3", "vit", "timm-eva02"])
def test_every_family_learns_what_the_oracle_does(watch, towers, family) -> None:
    """Each from its folder, all of it (rates and decays of layers are held by test_optim.py)."""
    if family not in towers:
        pytest.skip("timm is not installed")
    seen = watch(tower=str(towers[family]), steps=2, loss="sigmoid", layer_decay=1.0, weight_decay=0.0)
    compare(seen, seen.oracle())
