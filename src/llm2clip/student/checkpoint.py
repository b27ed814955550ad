"""Exact resume: weights, optimizer and step in one folder, written whole or not at all.

A checkpoint `checkpoints/step-00001000/` holds every tensor by name (`model/...`, `optimizer/PARAMETER/...`,
`average/...`), written by torch's distributed checkpoint: one safetensors file, or under FSDP2 one a process, each with
its own shards and where they lie in the whole; and `state.json` (the step, the number of files, the loss scaler,
counts). Each process reads what it needs from all files, so a run goes on with any number of processes, in shards or
not. There is no random state in it: the randomness of a step is a function of (seed, step, rank). Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from llm2clip.artifacts import atomic_path, read_json, to_disk
from llm2clip.errors import ArtifactError, setting

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
    saved: HuggingFaceStorageReader,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    *,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Put what a checkpoint holds back in place, on whatever devices and in whatever shards the run has now.

    Raises:
        ArtifactError: if a tensor of the model is missing or has another shape.
    """
    found = _described(saved)
    targets = state_tensors(model, [], average=average)
    for name, target in targets.items():
        shape = tuple(found[name].size) if name in found else None
        if shape != tuple(target.shape):
            problem = "is missing" if shape is None else f"has shape {shape}, not {tuple(target.shape)}"
            raise ArtifactError(
                f"the checkpoint does not fit this run: {name.partition('/')[2]} {problem}; delete the output folder"
            )
    for name, parameter, optimizer in _trained(model, optimizers):
        prefix = f"optimizer/{name}/"
        for entry in (entry for entry in found if entry.startswith(prefix)):
            if found[entry].size:
                value = torch.empty_like(parameter, requires_grad=False)  # on its device, in its shards
            else:  # a step count lies on the CPU, unless a fused optimizer counts on the device
                device = parameter.device if optimizer.defaults.get("fused") else "cpu"
                value = torch.empty((), dtype=found[entry].properties.dtype, device=device)
            targets[entry] = optimizer.state[parameter][entry.removeprefix(prefix)] = value
    with _as_plain_calls():
        load(targets, storage_reader=saved, no_dist=True)


def _described(saved: HuggingFaceStorageReader) -> dict[str, Any]:
    """What a checkpoint says of each tensor: its size, dtype and chunks."""
    return dict(saved.read_metadata().state_dict_metadata)


@contextlib.contextmanager
def _as_plain_calls() -> Iterator[None]:
    """Around calls of torch's checkpoint: an error is itself and no list of tracebacks, one process no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


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


class _Writer(HuggingFaceStorageWriter):
    """Writes straight to the file; torch's own makes the bytes of the whole file first, and takes twice as long."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file.parent), save_distributed=True)
        self.file = file

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what was planned for this process: its shards, and what others have too and it was chosen for."""
        tensors, places = {}, {}
        for item in plan.items:
            tensor: Any = planner.resolve_data(item)
            tensors[item.index.fqn] = tensor.detach().to("cpu", copy=True).contiguous()
            places[item.index.fqn] = {"saved_offsets": list(item.index.offset or ())}
        save_file(tensors, self.file, {"DCP_SHARDING_INFO": json.dumps(places)})  # as torch's own; its reader asks
        to_disk(self.file)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _file_name(process: int) -> str:
    return f"state-{process:05d}.safetensors"


def save_checkpoint(
    out: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, is_main: bool = True
) -> None:
    """Write `out/checkpoints/step-N` and drop all but the last two. All processes call it.

    Args:
        tensors: from `state_tensors`. Those in shards are written by the processes that hold them; if none are, the
            main process writes all.
        facts: what else the run must know, as JSON.
        is_main: whether this is the main process.

    Raises:
        ArtifactError: if another process wrote to a folder that the main one does not see.
    """
    in_shards = any(isinstance(value, DTensor) for value in tensors.values())
    if not (is_main or in_shards):
        return
    rank, num_files = (distributed.get_rank(), distributed.get_world_size()) if in_shards else (0, 1)
    folder = out / FOLDER
    temporary = folder / f".writing-{step:08d}"  # a new name each time: other machines may still know the last one
    if is_main:
        for left in folder.glob(".writing-*"):
            shutil.rmtree(left)
    if in_shards:
        distributed.barrier()  # a folder of an earlier, killed run is gone
    with _as_plain_calls():
        save(dict(tensors), storage_writer=_Writer(temporary / _file_name(rank)), no_dist=not in_shards)
    if is_main:
        _finish_checkpoint(temporary, folder / f"step-{step:08d}", {"step": step, "files": num_files, **facts})
        for old in _checkpoints(out)[:-KEPT]:
            shutil.rmtree(old)


def _finish_checkpoint(temporary: Path, target: Path, state: Mapping[str, Any]) -> None:
    for number in range(state["files"]):
        if not (temporary / _file_name(number)).exists():
            raise ArtifactError(
                f"process {number} wrote its part of {target.name} elsewhere: "
                f"{setting('out')} must be a folder that all machines see"
            )
    (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    to_disk(temporary / "state.json")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def load_checkpoint(out: Path) -> tuple[HuggingFaceStorageReader, dict[str, Any]] | None:
    """What reads the tensors, and the facts, of the last checkpoint in `out`, or None if there is none.

    Raises:
        ArtifactError: if it is damaged; the message names the folder to delete.
    """
    folders = _checkpoints(out)
    if not folders:
        return None
    try:
        facts, found = read_json(folders[-1] / "state.json"), len(list(folders[-1].glob("*.safetensors")))
        if (number := facts.pop("files")) != found:
            raise ArtifactError(f"{found} of {number} files are there")
        saved = HuggingFaceStorageReader(str(folders[-1]))
        for name, each in _described(saved).items():
            if sum(math.prod(chunk.sizes) for chunk in each.chunks) != math.prod(each.size):
                raise ArtifactError(f"{name} is not whole")
    except (SafetensorError, OSError, ValueError, KeyError, ArtifactError) as error:
        raise ArtifactError(
            f"checkpoint {folders[-1]} is damaged ({error}); delete it, and the run goes on from the one before"
        ) from None
    return saved, facts


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
