"""What of the tower learns: all of it, its last blocks, or low-rank adapters in it; and from which patches."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import UsageError, setting
from llm2clip.student.model import Student
from llm2clip.student.tower import add_patch_dropout, moving_norms, tower_blocks

logger = logging.getLogger("llm2clip")


def choose_what_learns(
    student: Student,
    *,
    unlocked_blocks: int | None = None,
    lora_rank: int = 0,
    lora_alpha: float = 32,
    patch_dropout: float = 0.0,
) -> None:
    """Lock the tower's first blocks, or all of it around low-rank adapters; by default everything learns.

    Raises:
        UsageError: if the tower has fewer blocks, no layer for adapters, or cannot drop patches.
    """
    if patch_dropout:
        try:
            add_patch_dropout(student.tower, rate=patch_dropout, image_size=student.config.image_size)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if unlocked_blocks is not None:
        lock_tower(student, unlocked_blocks=unlocked_blocks)
    if lora_rank:
        add_lora(student, rank=lora_rank, alpha=lora_alpha)
    lock_unused(student)
    if moving_norms(student.tower):
        logger.info(
            "the tower has norms over the images of a batch (BatchNorm) that learn: they see those that a process has "
            "in the tower at once, so other micro-batches or processes give another student; a locked tower has none"
        )


def lock_tower(student: Student, *, unlocked_blocks: int) -> None:
    """Let only the tower's last `unlocked_blocks` blocks, and the norms and heads after its blocks, learn.

    With 0 the whole tower is locked, its head too: the plain "locked image tuning" of LiT.

    Raises:
        UsageError: if the tower has fewer blocks.
    """
    blocks = tower_blocks(student.tower)
    if unlocked_blocks > len(blocks):
        raise UsageError(f"{setting('unlocked_blocks')} is {unlocked_blocks}, but the tower has {len(blocks)} blocks")
    student.tower.requires_grad_(False)
    if not unlocked_blocks:
        return
    for _, block in blocks[-unlocked_blocks:]:
        block.requires_grad_(True)
    for module in _after_blocks(student.tower, blocks):
        module.requires_grad_(True)


def lock_unused(student: Student) -> None:
    """Lock what no image's vector depends on, such as DINOv2's mask token: data-parallel training waits for it."""
    learning = [p for p in student.tower.parameters() if p.requires_grad]
    if not learning:
        return
    was_training = student.training
    pooled = student.eval().get_image_features(_black_image(student))  # in training, some layers drop others
    student.train(was_training)
    gradients = torch.autograd.grad(pooled.sum(), learning, allow_unused=True)
    for parameter, gradient in zip(learning, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def add_lora(student: Student, *, rank: int, alpha: float) -> Any:
    """Lock the tower and put low-rank adapters into every linear layer of its blocks; returns peft's handle on it.

    `student.tower` stays the same object, with adapters inside; `merge_lora` folds them into its weights.
    """
    from peft import LoraConfig, get_peft_model

    names = _called_linears(student)
    if not names:
        raise UsageError(
            f"{setting('lora_rank')} {rank}: a {student.config.vision_config.model_type} tower has no linear layers in "
            f"its blocks for adapters; leave it out, or learn the last blocks by {setting('unlocked_blocks', 1)}"
        )
    # peft scales by alpha / rank; its annotation asks for an int, its arithmetic does not
    return get_peft_model(student.tower, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))  # type: ignore[arg-type]


def merge_lora(student: Student, adapters: Any) -> None:
    """Fold the adapters of `add_lora` into the tower's weights, so that a plain tower is left."""
    student.tower = adapters.merge_and_unload()


def _called_linears(student: Student) -> list[str]:
    """Names of the linear layers in the tower's blocks that run as modules when it sees an image.

    Some families read a layer's weight without calling it (timm's EVA: its joint query-key-value layer): an adapter
    there would learn nothing and yet be merged.
    """
    linears = {
        module: f"{block_name}.{name}"
        for block_name, block in tower_blocks(student.tower)
        for name, module in block.named_modules()
        if type(module) is nn.Linear
    }
    called: list[str] = []
    hooks = [module.register_forward_hook(lambda m, *_: called.append(linears[m])) for module in linears]
    was_training = student.training
    with torch.no_grad():
        student.eval().get_image_features(_black_image(student))
    student.train(was_training)
    for hook in hooks:
        hook.remove()
    return [name for name in linears.values() if name in called]


def _black_image(student: Student) -> Tensor:
    return torch.zeros(1, 3, student.config.image_size, student.config.image_size, device=student.pixel_mean.device)


def _after_blocks(tower: nn.Module, blocks: list[tuple[str, nn.Module]]) -> list[nn.Module]:
    """The modules that follow the tower's blocks in its order of definition: last norms, pooling heads."""
    list_name = blocks[-1][0].rpartition(".")[0]
    after, seen = [], False
    for name, module in tower.named_modules():
        if name == list_name:
            seen = True
        elif seen and not name.startswith(f"{list_name}."):
            after.append(module)
    return after
