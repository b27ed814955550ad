"""The device to run on, and the arithmetic that it is good at: one rule for every verb."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm2clip.artifacts import RUN, read_json
from llm2clip.errors import UsageError, one_line

Config = TypeVar("Config")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of each precision that a setting can name, but for "auto"."""


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, if it is there; by default the GPU of the process's local rank, Apple's GPU, or the CPU.

    Raises:
        UsageError: if there is no such device.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = one_line(error)
        raise UsageError(f"the device {str(device)!r} cannot be used ({reason}); {_choices()}") from None
    return chosen


def _choices() -> str:
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return f"leave it out or write {' or '.join(['cpu', *(name for name, there in gpus.items() if there)])}"


def pick_precision(precision: str, device: torch.device) -> str:
    """`precision`, or for "auto" bf16 where the hardware computes in it, else fp16 on a CUDA GPU and fp32 elsewhere.

    A CPU without AVX512_BF16, AMX or Arm's bf16 emulates it, many times slower than fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AVX512_BF16, AMX, or Arm's)."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def settle_precision(config: Config, out: Path) -> Config:
    """`config` with the precision that "auto" stands for: what a run begun in `out` uses, else the machine's best."""
    settings: Any = config
    if settings.precision != "auto":
        return config
    begun = read_json(out / RUN).get("config", {}).get("precision") if (out / RUN).exists() else None
    return dataclasses.replace(settings, precision=begun or pick_precision("auto", pick_device()))  # type: ignore[no-any-return]


def is_emulated(model: Any, device: torch.device) -> bool:
    """Whether a CPU would emulate the half precision of some of a model's weights, many times slower than float32."""
    fast = {torch.float32, torch.float64, *([torch.bfloat16] if cpu_has_bf16() else [])}
    return device.type == "cpu" and not {weight.dtype for weight in _saved(model)} <= fast


def _saved(model: Any) -> list[torch.Tensor]:
    """The numbers of a model that its files hold: not what is computed when it is made, as position frequencies are."""
    return [tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()]


def cast(model: Any, device: torch.device, dtype: torch.dtype | str | None = None) -> Any:
    """`model` on `device`, its weights in `dtype`.

    Args:
        dtype: "auto" leaves the weights as they were saved; None too, but makes them float32 where a CPU would emulate
            their half precision, many times slower.

    >>> half = torch.nn.Linear(2, 2, dtype=torch.float16)
    >>> cast(half, torch.device("cpu"), "auto").weight.dtype, cast(half, torch.device("cpu")).weight.dtype
    (torch.float16, torch.float32)
    """
    model = model.to(device)
    if dtype is None:
        dtype = torch.float32 if is_emulated(model, device) else "auto"
    if dtype == "auto":
        return model
    for tensor in _saved(model):
        tensor.data = tensor.data.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model
