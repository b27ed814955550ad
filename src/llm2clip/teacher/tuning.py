"""What of a teacher trains: LoRA where captions pass, an adaptor behind the pooling, or every weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from torch.distributed.tensor import DTensor, distribute_tensor

from llm2clip.errors import UsageError, setting
from llm2clip.teacher.fingerprint import forget_origin
from llm2clip.teacher.model import llm
from llm2clip.teacher.reach import adaptable, exact_targets, first_line


def with_lora(model: Any, *, rank: int = 16, alpha: float = 32, dropout: float = 0.05, seed: int = 0) -> Any:
    """`model` with its weights frozen and adapters, drawn from `seed`, on its linear layers that captions pass.

    The output layer gets none. Experts held as one weight get theirs without dropout: what is added to such a weight
    is no layer that an input could be dropped before.

    Raises:
        UsageError: if peft cannot adapt this model.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import ParamWrapper

    layers, stacks = adaptable(model)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0 if stacks else dropout,
        target_modules=layers,
        target_parameters=stacks or None,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # peft asks a question that transformers has renamed
        try:
            with exact_targets(model, needed=bool(stacks)):
                adapted: Any = get_peft_model(model, settings)
        except ValueError as error:  # such as the layers of a state space model
            raise UsageError(
                f"peft cannot adapt this LLM ({first_line(error)}); give {setting('tuning', 'full')}, or another LLM"
            ) from error
    if stacks and dropout:
        for layer in adapted.modules():
            if hasattr(layer, "lora_dropout") and not isinstance(layer, ParamWrapper):
                layer.lora_dropout["default"] = torch.nn.Dropout(dropout)
        settings.lora_dropout = dropout
    return adapted


def add_lora(
    encoder: SentenceTransformer, *, rank: int = 16, alpha: float = 32, dropout: float = 0.05, seed: int = 0
) -> None:
    """Freeze the LLM of an encoder and put LoRA where captions pass; only that trains from here on."""
    encoder[0].model = with_lora(llm(encoder), rank=rank, alpha=alpha, dropout=dropout, seed=seed)
    forget_origin(encoder)


def merge_lora(encoder: SentenceTransformer) -> None:
    """Add the adapters into the weights they sit on, and remove them."""
    encoder[0].model = llm(encoder).merge_and_unload()


def move_lora(encoder: SentenceTransformer, base: SentenceTransformer, *, folder: Path) -> None:
    """Put the adapters of `encoder` on the LLM of `base`, which `encoder` takes over; `folder` holds them meanwhile.

    Adapters trained on 4-bit weights are merged into the full ones: merging into 4 bits would round most of them away.
    """
    from peft import PeftModel

    adapted = llm(encoder)
    stacks = bool(adapted.peft_config["default"].target_parameters)
    adapted.save_pretrained(str(folder))
    with warnings.catch_warnings(), exact_targets(llm(base), needed=stacks):
        warnings.simplefilter("ignore", FutureWarning)
        encoder[0].model = PeftModel.from_pretrained(llm(base), str(folder))


def add_adaptor(encoder: SentenceTransformer, *, layers: int) -> None:
    """Put residual layers behind the pooling; they start as nothing, and are sentence-transformers' own modules."""
    dim = encoder.get_embedding_dimension()
    assert dim is not None
    for _ in range(layers):
        layer = Dense(
            dim,
            dim,
            activation_function=torch.nn.GELU(),
            use_residual=True,
            init_weight=torch.zeros(dim, dim),
            init_bias=torch.zeros(dim),
        )
        encoder.append(layer.to(encoder.device))
    if layers:
        forget_origin(encoder)


def set_attention_dropout(model: torch.nn.Module, fraction: float) -> None:
    """Set the dropout of attention weights in training; the saved config stays as it was."""
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float | int):
            module.attention_dropout = fraction  # type: ignore[assignment]


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that train, whole and on the CPU, by name; where they are sharded, all processes must call."""
    chosen = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    whole = {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in chosen.items()}
    return {name: weight.cpu().contiguous() for name, weight in sorted(whole.items())}


def load_trained(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put whole weights back, from `trained_weights`, into a model that may be sharded."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                weight = distribute_tensor(weight.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(weight)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the processes hold a share each of the weights (FSDP2)."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())
