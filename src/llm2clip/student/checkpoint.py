"""Exact resume: weights, optimizer and step in one folder, written whole or not at all.

A checkpoint `checkpoints/step-00001000/` holds `state.safetensors` (every tensor by name: `model/...`,
`optimizer/PARAMETER/...`, `average/...`) and `state.json` (the step, the loss scaler, counts). There is no random
state in it: the randomness of a step is a function of (seed, step, rank). Tensors are whole, also under FSDP2, so a
run goes on with any number of processes. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llm2clip.artifacts import atomic_path, read_json
from llm2clip.errors import ArtifactError

FOLDER = "checkpoints"
KEPT = 2
BEST = "best.safetensors"


def collect_state(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    *,
    average: Mapping[str, Tensor] | None = None,
    keep: bool = True,
) -> dict[str, Tensor]:
    """Every tensor of a run on the CPU, by name. Under FSDP2 all processes must call it.

    Args:
        model: the unwrapped student.
        optimizers: those that train it.
        average: running average of its weights, by parameter name.
        keep: False on processes that only lend their shards: they get nothing, and copy nothing.
    """
    parts = [(f"model/{name}", value) for name, value in model.state_dict().items()]
    for name, parameter, optimizer in _trained(model, optimizers):
        state = optimizer.state.get(parameter, {})
        parts += [(f"optimizer/{name}/{key}", torch.as_tensor(value)) for key, value in state.items()]
    parts += [(f"average/{name}", value) for name, value in (average or {}).items()]
    tensors = {}
    for name, value in parts:
        whole = value.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if keep:
            tensors[name] = whole.to("cpu", copy=True).contiguous()
    return tensors


def restore_state(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    *,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Put what `collect_state` took back in place, on whatever devices the run uses now.

    Raises:
        ArtifactError: if a tensor of the model is missing or has another shape.
    """
    for name, value in model.state_dict().items():
        _copy(tensors, f"model/{name}", value)
    for name, value in (average or {}).items():
        _copy(tensors, f"average/{name}", value)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            owner, _, key = name.removeprefix("optimizer/").rpartition("/")
            by_parameter.setdefault(owner, {})[key] = value
    for name, parameter, optimizer in _trained(model, optimizers):
        for key, value in by_parameter.get(name, {}).items():
            # A step count lies on the CPU, unless a fused optimizer counts on the device; it is never sharded.
            counted_on = parameter.device if optimizer.defaults.get("fused") else "cpu"
            state: dict[str, Tensor] = optimizer.state[parameter]
            state[key] = value.to(counted_on, copy=True) if value.ndim == 0 else _like(value, parameter)


def save_checkpoint(out: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write `out/checkpoints/step-N` and drop all but the last two. Only the main process calls it."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(dict(tensors), temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1) + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    target = folder / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    for old in _checkpoints(out)[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of the last checkpoint in `out`, or None if there is none.

    Raises:
        ArtifactError: if it is damaged; the message names the folder to delete.
    """
    folders = _checkpoints(out)
    if not folders:
        return None
    try:
        return load_file(folders[-1] / "state.safetensors"), read_json(folders[-1] / "state.json")
    except (SafetensorError, OSError, ArtifactError) as error:
        raise ArtifactError(
            f"checkpoint {folders[-1]} is damaged ({error}); delete it, and the run goes on from the one before"
        ) from None


def save_best(out: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep `tensors` as the best so far. Only the main process calls it."""
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    with atomic_path(out / FOLDER / BEST) as temporary:
        save_file(dict(tensors), temporary)


def load_best(out: Path) -> dict[str, Tensor]:
    """What `save_best` kept.

    Raises:
        ArtifactError: if it is damaged.
    """
    try:
        return load_file(out / FOLDER / BEST)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{out / FOLDER / BEST} is damaged ({error}); delete {out} and train again") from None


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 hex digits of the SHA-256 of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def drop_checkpoints(out: Path) -> None:
    """Delete the checkpoints of a finished run."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("step-*"))


def _trained(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    """Each parameter with its name and the optimizer that holds it."""
    holder = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in holder:
            yield name, parameter, holder[parameter]


def _like(value: Tensor, target: Tensor) -> Tensor:
    """`value` on the device, and in the shards, of `target`."""
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device, copy=True)


def _copy(tensors: Mapping[str, Tensor], name: str, target: Tensor) -> None:
    value = tensors.get(name)
    if value is None or value.shape != target.shape:
        found = "is missing" if value is None else f"has shape {tuple(value.shape)}, not {tuple(target.shape)}"
        raise ArtifactError(f"the checkpoint does not fit this run: {name} {found}; delete the output folder")
    with torch.no_grad():
        target.copy_(_like(value, target))
