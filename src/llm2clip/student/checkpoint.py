"""Exact resume: weights, optimizer and step in one folder, written whole or not at all.

A checkpoint `checkpoints/step-00001000/` holds every tensor by name (`model/...`, `optimizer/PARAMETER/...`,
`average/...`) in one safetensors file, or under FSDP2 in one file a process, each with its own shards and where they
lie in the whole; and `state.json` (the step, the number of files, the loss scaler, counts). Each process reads what it
needs from all files, so a run goes on with any number of processes, in shards or not. There is no random state in it:
the randomness of a step is a function of (seed, step, rank). Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm2clip.artifacts import atomic_path, read_json, to_disk
from llm2clip.errors import ArtifactError, setting
from llm2clip.student.pieces import Pieces, file_name, local_part, write_pieces

FOLDER = "checkpoints"
KEPT = 2
BEST = "best.safetensors"


def state_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], *, average: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every tensor of a run by its name in a checkpoint, where it lies: under FSDP2, in shards.

    Args:
        model: the unwrapped student.
        optimizers: those that train it.
        average: running average of its weights, by parameter name.
    """
    tensors = {f"model/{name}": value.detach() for name, value in model.state_dict().items()}
    for name, parameter, optimizer in _trained(model, optimizers):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value).detach()
    return tensors | {f"average/{name}": value for name, value in (average or {}).items()}


def restore_state(
    checkpoint: Pieces,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    *,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Put what a checkpoint holds back in place, on whatever devices and in whatever shards the run has now.

    Raises:
        ArtifactError: if a tensor of the model is missing, has another shape or is not whole.
    """
    for name, target in state_tensors(model, [], average=average).items():
        shape = checkpoint.shape(name)
        if shape != tuple(target.shape):
            found = "is missing" if shape is None else f"has shape {shape}, not {tuple(target.shape)}"
            raise ArtifactError(
                f"the checkpoint does not fit this run: {name.partition('/')[2]} {found}; delete the output folder"
            )
        local_part(target).copy_(checkpoint.read_like(name, target))
    for name, parameter, optimizer in _trained(model, optimizers):
        prefix = f"optimizer/{name}/"
        for entry in checkpoint.names(prefix):
            state: dict[str, Tensor] = optimizer.state[parameter]
            state[entry.removeprefix(prefix)] = _optimizer_state(checkpoint, entry, parameter, optimizer)


def _optimizer_state(checkpoint: Pieces, name: str, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    if not checkpoint.shape(name):  # a step count lies on the CPU, unless a fused optimizer counts on the device
        return checkpoint.read(name).to(parameter.device if optimizer.defaults.get("fused") else "cpu")
    value = torch.empty_like(parameter, requires_grad=False)  # on its device, in its shards
    local_part(value).copy_(checkpoint.read_like(name, parameter))
    return value


def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The weights by name, whole and on the CPU. Under FSDP2 all processes must call it.

    Args:
        keep: False on processes that only lend their shards: they get nothing, and copy nothing.
    """
    weights = {}
    for name, value in model.state_dict().items():
        whole = value.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if keep:
            weights[name] = whole.to("cpu", copy=True).contiguous()
    return weights


def save_checkpoint(
    out: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    process: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Write `out/checkpoints/step-N` and drop all but the last two. All processes call it.

    Args:
        tensors: from `state_tensors`. Those in shards are written by the processes that hold them, others by the first.
        facts: what else the run must know, as JSON.
        wait: returns once all processes have called it.

    Raises:
        ArtifactError: if another process wrote to a folder that the first does not see.
    """
    num_files = num_processes if any(isinstance(value, DTensor) for value in tensors.values()) else 1
    if process >= num_files:
        return
    folder = out / FOLDER
    temporary = folder / f".writing-{step:08d}"  # a new name each time: other machines may still know the last one
    if process == 0:
        for left in folder.glob(".writing-*"):
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
    if num_files > 1:
        wait()  # a folder of an earlier, killed run is gone
    temporary.mkdir(parents=True, exist_ok=True)
    write_pieces(temporary / file_name(process, num_files), tensors, first=process == 0)
    if num_files > 1:
        wait()
    if process == 0:
        _finish_checkpoint(temporary, folder / f"step-{step:08d}", {"step": step, "files": num_files, **facts})
        for old in _checkpoints(out)[:-KEPT]:
            shutil.rmtree(old)


def _finish_checkpoint(temporary: Path, target: Path, state: Mapping[str, Any]) -> None:
    num_files = state["files"]
    for number in range(num_files):
        if not (temporary / file_name(number, num_files)).exists():
            raise ArtifactError(
                f"process {number} wrote its part of {target.name} elsewhere: "
                f"{setting('out')} must be a folder that all machines see"
            )
    (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    to_disk(temporary / "state.json")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def load_checkpoint(out: Path) -> tuple[Pieces, dict[str, Any]] | None:
    """Tensors and facts of the last checkpoint in `out`, or None if there is none.

    Raises:
        ArtifactError: if it is damaged; the message names the folder to delete.
    """
    folders = _checkpoints(out)
    if not folders:
        return None
    try:
        facts = read_json(folders[-1] / "state.json")
        return Pieces(folders[-1], facts.pop("files")), facts
    except (SafetensorError, OSError, ValueError, KeyError, ArtifactError) as error:
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
