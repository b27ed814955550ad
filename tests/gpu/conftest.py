"""Tiny models, a bank and a student that the tests of this folder share, and the state they leave behind."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for where products must be reproducible

import pytest
import torch

from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankConfig
from llm2clip.student.config import StudentConfig

from .place import NO_GPU, ON_GPU


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """Where the product computes by its own choice."""
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    if not ON_GPU and torch.cuda.is_available():
        pytest.skip("LLM2CLIP_TEST_DEVICE=cpu, but there is a GPU that would be used: unset LLM2CLIP_TEST_GPUS")
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def state_is_put_back() -> Iterator[None]:
    """The command line sets up logging for its process, which is the tests' own here."""
    logger = logging.getLogger("llm2clip")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"):
            patch.setenv(name, os.environ.get(name, ""))
            patch.delenv(name)
        yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def full_precision(device: torch.device) -> Iterator[None]:
    """True float32 also in convolutions, where torch itself allows TF32 (of 10 bits) on a GPU and llm2clip lets it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def deterministic(full_precision: None) -> Iterator[None]:
    """Kernels that add in the same order every time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def bank(device: torch.device, finished_teacher: Path, images_csv: Path, tmp_path_factory: Any) -> Path:
    """A bank of the images, encoded on the device in fp32."""
    settings = {"data": (str(images_csv),), "teacher": str(finished_teacher), "precision": "fp32"}
    return build_bank(BankConfig(**settings, out=tmp_path_factory.mktemp("banks") / "bank"))


@pytest.fixture
def student_config(bank: Path, tiny_tower: Path, tmp_path: Path) -> Callable[..., StudentConfig]:
    """A function from a folder's name and settings to a config of a run of a second."""

    def make(name: str, **settings: Any) -> StudentConfig:
        usual = {"steps": 6, "batch_size": 8, "dim": 16, "workers": 0, "precision": "fp32", "tracker": "none"}
        rates = {"learning_rate": 1e-3, "adaptor_learning_rate": 1e-3}
        where = {"bank": (str(bank),), "tower": str(tiny_tower), "out": tmp_path / name}
        return StudentConfig(**{**where, **usual, **rates, **settings})

    return make
