"""The accelerator of a training run: processes, devices, precision, the compiler and trackers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, gather_object
from packaging.version import Version

from llm2clip.artifacts import forget_unused
from llm2clip.compat import forget_precision
from llm2clip.errors import LLM2CLIPError, UsageError, one_line, setting
from llm2clip.journal import find_tracker
from llm2clip.student.config import StudentConfig

CURVES = "curves"
"""Folder in the output where a tracker on disk (TensorBoard) writes."""


def start_accelerator(config: StudentConfig) -> Any:
    """The accelerator of a run: processes, devices, precision and trackers.

    Raises:
        UsageError: if a tracker is not installed, the device cannot do the precision, or accelerate is set to a way
            of sharing the work that a student cannot.
    """
    trackers = find_tracker(config.tracker) or None
    forget_precision()  # another stage in this process may have had another precision
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else torchrun's processes would not see each other there
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            log_with=trackers,
            project_config=ProjectConfiguration(str(config.out), logging_dir=str(Path(config.out) / CURVES)),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise UsageError(f"{setting('precision')} {config.precision} cannot be had here ({error}); take fp32") from None
    if accelerator.distributed_type in ("DEEPSPEED", "MEGATRON_LM", "FSDP") and not accelerator.is_fsdp2:
        raise UsageError(
            f"accelerate is set to {accelerator.distributed_type.value}; a student trains under DDP or FSDP version 2: "
            "choose one of them by accelerate config (fsdp_version: 2)"
        )
    if accelerator.is_fsdp2:
        check_sharding(config, accelerator.state.fsdp_plugin)
        keep_sums_whole(accelerator.state.fsdp_plugin)
    return accelerator


def check_sharding(config: StudentConfig, plugin: Any) -> None:
    """Check that FSDP2 can do what is asked for.

    Raises:
        UsageError: for accelerate's own activation checkpointing, which renames weights, and for an adaptor's warm-up
            in half precision before torch 2.14, whose FSDP2 gives gradients of the wrong dtype once the tower learns.
    """
    if plugin.activation_checkpointing:
        raise UsageError(
            "accelerate is set to fsdp_activation_checkpointing; turn it off and give "
            f"{setting('gradient_checkpointing', True)}"
        )
    old = Version(torch.__version__).release < (2, 14)
    if old and config.adaptor_warmup_steps and config.precision != "fp32":
        raise UsageError(
            f"{setting('adaptor_warmup_steps')} under FSDP2 in {config.precision} needs torch 2.14 (this is "
            f"{torch.__version__}); take {setting('precision', 'fp32')}, DDP or no warm-up"
        )


def keep_sums_whole(plugin: Any) -> None:
    """Have FSDP2 add gradients up, over micro-batches and processes, and give vectors in fp32, as DDP does.

    accelerate's own policy does both in the precision of the arithmetic.
    """
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


@contextlib.contextmanager
def fail_together(accelerator: Any, out: Path) -> Iterator[None]:
    """Around what each process does by itself: if one fails, all do, and leave no trace in `out` if nothing is there.

    torchrun ends all processes as soon as one has failed, so that the main one would not come to tidy up.
    """
    error: LLM2CLIPError | None = None
    try:
        yield
    except LLM2CLIPError as caught:
        error = caught
    failed = [each for each in gather_object([error]) if each is not None]
    if not failed:
        return
    if accelerator.is_main_process:
        forget_unused(out)
    accelerator.wait_for_everyone()
    raise error or failed[0]


def compile_tower(tower: Any, *, device: torch.device) -> None:
    """Run a tower through torch.compile from its next call on.

    Raises:
        UsageError: if this machine cannot compile, as one without a C++ compiler.
    """
    # Patches are dropped as without it: by itself the compiler draws other random numbers.
    options: dict[str, Any] = {"fallback_random": True}
    try:
        torch.compile(torch.neg, options=options)(torch.ones(2, device=device))
    except (RuntimeError, OSError) as error:
        raise UsageError(f"{setting('compile')} does not work here ({one_line(error)}); leave it out") from None
    tower.compile(options=options)
