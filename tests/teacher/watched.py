"""What a run of the teacher draws and does, noted while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from llm2clip.teacher.mixture import Mixture
from llm2clip.teacher.mntp import MaskedTexts


class Seen:
    """What a run of the product drew, how its weights started, and what it left, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {"PairTrainer": [], "MaskedTrainer": []}
        self.losses: dict[str, list[float]] = {"PairTrainer": [], "MaskedTrainer": []}
        self.start: dict[str, dict[str, Tensor]] = {}
        self.facts: dict[str, list[SimpleNamespace]] = {"PairTrainer": [], "MaskedTrainer": []}
        self.sizes: set[int] = set()
        step = Trainer.training_step
        for kind, data in (("PairTrainer", Mixture), ("MaskedTrainer", MaskedTexts)):
            monkeypatch.setattr(data, "__getitem__", self._noting(data.__getitem__, self.rows[kind]))

        def stepped(trainer: Any, model: Any, *args: Any, **options: Any) -> Any:
            kind = type(trainer).__name__
            if kind not in self.start:
                self.start[kind] = {_plain_name(n): w.detach().clone() for n, w in model.named_parameters()}
                if kind == "PairTrainer":
                    model.register_forward_pre_hook(self._note_size)
            loss = step(trainer, model, *args, **options)
            self.losses[kind].append(loss.item())
            self.facts[kind].append(facts_of(trainer, model))
            return loss

        monkeypatch.setattr(Trainer, "training_step", stepped)

    def _note_size(self, model: Any, args: Any) -> None:
        if model.training:
            self.sizes.add(len(args[0]["input_ids"]))

    @staticmethod
    def _noting(draw: Callable[..., Any], rows: list[dict[str, Any]]) -> Callable[..., Any]:
        def drawn(data: Any, key: Any) -> Any:
            rows.append(dict(draw(data, key)))
            return dict(rows[-1])

        return drawn

    def down(self, kind: str) -> dict[str, Tensor]:
        """How A of each adapter started."""
        end = ".lora_A.default.weight"
        return {name.removesuffix(end): weight for name, weight in self.start[kind].items() if name.endswith(end)}

    def batches(self, kind: str, size: int) -> list[list[dict[str, Any]]]:
        rows = self.rows[kind]
        assert len(rows) == size * len(self.losses[kind])
        return [rows[i : i + size] for i in range(0, len(rows), size)]


def _plain_name(name: str) -> str:
    """The name of a weight inside the LLM, whatever wraps it here."""
    for around in ("0.model.", "base_model.model.", "model."):
        name = name.removeprefix(around)
    return name.replace(".base_layer.", ".")


def facts_of(trainer: Any, model: Any) -> SimpleNamespace:
    """What of a model in training is no number of its result."""
    modules = list(model.modules())
    return SimpleNamespace(
        dropouts={m.p for m in modules if isinstance(m, torch.nn.Dropout) and m.training},
        attention={m.attention_dropout for m in modules if isinstance(getattr(m, "attention_dropout", None), float)},
        checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in modules),
        dtypes={("lora" if "lora_" in n else "llm", w.dtype) for n, w in model.named_parameters()},
        autocast=trainer.accelerator.mixed_precision,
    )
