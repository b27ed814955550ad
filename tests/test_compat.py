"""Private names of other libraries: still there, and what our functions make of them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from llm2clip.compat import (
    OwnWeights,
    attention_of,
    bicubic_into,
    cpu_has_bf16,
    forget_precision,
    take_back_signal_handler,
)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_bf16_by_what_the_cpu_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True, name: True}, raising=False)
    assert cpu_has_bf16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True, name: False})
    assert not cpu_has_bf16()


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bf16_where_torch_has_only_private_questions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda each=each: each == name, raising=False)
    assert cpu_has_bf16()
    monkeypatch.delattr(torch.cpu, name)
    assert not cpu_has_bf16()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_of_a_model_can_be_given_back(attention: str, tiny_llm: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_llm)
    model.set_attn_implementation(attention)
    assert attention_of(model) == attention


def test_accelerate_takes_another_precision_once_the_first_is_forgotten() -> None:
    from accelerate import Accelerator

    forget_precision()
    Accelerator(cpu=True, mixed_precision="no")
    with pytest.raises(ValueError, match="mixed_precision"):
        Accelerator(cpu=True, mixed_precision="bf16")
    forget_precision()
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    forget_precision()


def test_only_torchs_signal_handler_is_taken_back() -> None:
    def handler(number: int, frame: object) -> None: ...

    before = signal.getsignal(signal.SIGCHLD)
    try:
        signal.signal(signal.SIGCHLD, handler)
        take_back_signal_handler()
        assert signal.getsignal(signal.SIGCHLD) is handler
        handler.__module__ = "torch.utils.data._utils.signal_handling"
        take_back_signal_handler()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_trainer_reads_its_weights_by_the_hook() -> None:
    from sentence_transformers import SentenceTransformerTrainer
    from transformers import Trainer

    class Own(OwnWeights):
        def load_weights(self, folder: Path, model: object = None) -> None:
            self.read = folder, model

    for trainer in (Trainer, SentenceTransformerTrainer):
        own = type("Mine", (Own, trainer), {})
        hook = own._load_from_checkpoint
        assert hook is OwnWeights._load_from_checkpoint and hasattr(trainer, "_load_from_checkpoint")
    own = Own()
    own._load_from_checkpoint("checkpoint-1")
    assert own.read == (Path("checkpoint-1"), None)


@pytest.mark.parametrize("shape", [(24, 30), (90, 70), (61, 50)])
def test_resizing_into_given_memory_is_interpolate(shape: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (1, 61, 80, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = torch.zeros(3, *shape, 4, dtype=torch.uint8)
    bicubic_into(batch[1:2].permute(0, 3, 1, 2), pixels.permute(0, 3, 1, 2))
    expected = torch.nn.functional.interpolate(pixels.permute(0, 3, 1, 2), shape, mode="bicubic", antialias=True)
    assert torch.equal(batch[1], expected[0].permute(1, 2, 0)) and not batch[[0, 2]].any()
