"""train-student: the training step, the loop around it, and the finished folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from llm2clip import few
from llm2clip.artifacts import is_complete, open_output, say_complete, write_manifest
from llm2clip.bank.reader import Bank
from llm2clip.config import save_interval
from llm2clip.errors import setting
from llm2clip.hub import settle_precision
from llm2clip.journal import LOG, logged
from llm2clip.outlook import ENOUGH, ends, has_not_moved, learned_nothing, more_steps, near_chance, too_few_steps
from llm2clip.student.accelerator import CURVES, start_accelerator
from llm2clip.student.checkpoint import drop_checkpoints, tensors_fingerprint
from llm2clip.student.config import StudentConfig
from llm2clip.student.data import Batch
from llm2clip.student.gradcache import cached_step
from llm2clip.student.inheritance.inherit import FILE as INHERITED
from llm2clip.student.inheritance.keep import Objective
from llm2clip.student.loss import contrastive_loss
from llm2clip.student.mix import PAPER_BATCH, default_batch_size, wanted_kinds
from llm2clip.student.model import Student, StudentModelConfig
from llm2clip.student.optim import cosine_factor
from llm2clip.student.session import Session
from llm2clip.student.trainable import add_lora, merge_lora

logger = logging.getLogger("llm2clip")
SCRAPS = (LOG, CURVES, INHERITED)
"""What a run leaves before its first checkpoint."""


def train_student(config: StudentConfig) -> Path:
    """Train a student as `config` says and return its folder; the same call goes on where a killed run stopped.

    Raises:
        UsageError: for a bank, tower or setting that cannot be.
        TooManyBadSamples: if more images than `--max-bad-fraction` cannot be read.
        LLM2CLIPError: if the loss is no number any more.

    Example:
        >>> settings = StudentConfig(bank=("bank",), tower="openai/clip-vit-base-patch16", out="student")
        >>> train_student(settings)                                                    # doctest: +SKIP
    """
    transformers.utils.logging.disable_progress_bar()  # the run has its own
    out = Path(config.out)
    config = settle_precision(config, out)
    accelerator = start_accelerator(config)
    config = settle_few(config, accelerator)
    held: Any = contextlib.nullcontext()
    if accelerator.is_main_process:
        held = open_output(out, "student", config=config.settings(), scraps=SCRAPS)
    with held:
        accelerator.wait_for_everyone()  # the others go on once the main process has the folder
        if is_complete(out):
            say_complete(out)
        else:
            run = Session(config, accelerator)
            _warn(run, too_short(run))
            train(run)
            finish(run)
            _warn(run, nothing_learned(run, logged(out / LOG, "loss")))
        if accelerator.is_main_process:
            drop_checkpoints(out)
            (out / INHERITED).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    return out


def settle_few(config: StudentConfig, accelerator: Any) -> StudentConfig:
    """`config` with what it leaves open by the number of images in its banks: length, batch, what learns."""
    weights = config.bank_weights or [1.0] * len(config.bank)
    images = sum(Bank.open(bank).num_samples for bank, weight in zip(config.bank, weights, strict=True) if weight)
    chosen: dict[str, Any] = {}
    if images < few.FEW_IMAGES:
        batch_size = min(few.STUDENT_BATCH, images) // accelerator.num_processes * accelerator.num_processes
        chosen = {"batch_size": batch_size, "steps": few.STUDENT_STEPS}
        if not config.lora_rank and config.init == "pretrained":
            chosen["unlocked_blocks"] = 0
    found = few.settle(config, chosen, images=images, main=accelerator.is_main_process)
    if config.batch_size is None and "batch_size" not in found:
        found["batch_size"] = default_batch_size(images, accelerator.num_processes)
        if accelerator.is_main_process and images < PAPER_BATCH:
            logger.info(
                "batches of %d: all images there are, where the paper takes %d", found["batch_size"], PAPER_BATCH
            )
    return dataclasses.replace(config, **found)


def _warn(run: Session, line: str) -> None:
    if line and run.accelerator.is_main_process:
        logger.warning("%s", line)


def too_short(run: Session) -> str:
    """A warning if a run has too few steps to learn anything."""
    return too_few_steps("student", [run.loader.num_samples], steps=run.total_steps, **_amounts(run))


def _amounts(run: Session) -> dict[str, Any]:
    """What decides how many steps there are."""
    config, num_processes = run.config, run.accelerator.num_processes
    sizes = {"batch_size": config.batch_size, "accumulate": config.accumulate, "num_processes": num_processes}
    return {**sizes, "by_steps": config.steps is not None}


def nothing_learned(run: Session, losses: list[dict[str, float]]) -> str:
    """A warning if a run ended as it began: by its loss, and by the images that find their caption in a batch.

    Args:
        losses: the log's lines with a loss.
    """
    config = run.config
    if not losses or config.batch_size is None:
        return ""
    first, last = ends([line["loss"] for line in losses])
    guessing = math.log(config.batch_size) if config.loss == "softmax" else None
    right, choices = ends([line["accuracy"] for line in losses])[1], run.loader.size
    stands = guessing is None or has_not_moved(first, last, guessing=guessing)  # the sigmoid's falls by its bias alone
    if not (near_chance(right, choices) and stands):
        return ""
    found = f"{right:.1%} of a batch's images find their caption, {1 / choices:.1%} of who guesses"
    rates = setting("adaptor_learning_rate", 1e-3)
    if config.unlocked_blocks != 0:
        rates = f"{setting('learning_rate')} or {rates}"
    advice = f"see that captions belong to their images, and give another {rates}"
    if run.total_steps < ENOUGH:
        advice = f"give {more_steps([run.loader.num_samples], **_amounts(run))}"
    return learned_nothing("student", first, last, guessing=guessing, found=found, advice=advice)


def train(run: Session) -> None:
    """Take the steps that are left, saving and scoring now and then."""
    config = run.config
    save_every = save_interval(config.save_every, run.total_steps)
    val_every = save_interval(config.val_every, run.total_steps)
    for batches in run.batches():
        run.journal.add(run.step + 1, train_step(run, batches))
        run.step += 1
        last = run.step == run.total_steps
        if config.val_bank and (last or run.step % val_every == 0) and run.score() and not last:
            logger.info("no better score for %d times: stopping at step %d", run.waited, run.step)
            break
        if not last and run.step % save_every == 0:
            run.save()
    run.journal.close()


def train_step(run: Session, batches: list[Batch]) -> dict[str, Tensor]:
    """One optimizer step on batches of images and the teacher's vectors of their captions; what the log says of it.

    What it depends on besides weights and batches is a function of its number, so that a checkpoint holds none of it.
    """
    config, accelerator = run.config, run.accelerator
    factor = cosine_factor(run.step, run.total_steps, config.warmup_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    torch.manual_seed(step_seed(config.seed, run.step, accelerator.process_index))  # dropout, dropped patches
    if run.frozen and run.step >= config.adaptor_warmup_steps:
        run.thaw()

    losses = []
    for number, batch in enumerate(batches):  # forward and backward of each, in micro-batches
        size = config.micro_batch_size or len(batch)
        texts = batch.text_embeds.split(size * config.captions_per_image)
        micro_batches = list(zip(batch.pixels.split(size), texts, strict=True))
        # with its rows, equal captions of different images are no wrong answers
        loss_of = partial(contrastive_loss, kind=config.loss, label_smoothing=config.label_smoothing, rows=batch.rows)
        objective = Objective(loss_of, micro_batches, **run.to_keep(batch, place=run.step * len(batches) + number))
        weight, is_last = 1 / len(batches), batch is batches[-1]
        micro_batches = objective.micro_batches
        loss, vectors = cached_step(run.model, micro_batches, objective, accelerator, weight=weight, sync=is_last)
        losses.append(loss)

    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # FSDP2
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.student.clamp_logit_scale()
    if run.average is not None:
        run.average.update(run.student)
    right = accuracy(vectors["image"], objective.captions(vectors["text"]))
    return {"loss": torch.stack(losses).mean(), "accuracy": right, "scale": vectors["scale"], "grad_norm": grad_norm}


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of all that a process draws in a step.

    >>> step_seed(0, step=7, process=1)
    663341227
    """
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])


@torch.no_grad()
def accuracy(image: Tensor, text: Tensor, *, tile: int = 2048) -> Tensor:
    """Share [] of the images whose own caption scores best among those of this process's batch.

    >>> accuracy(torch.eye(3), torch.eye(3)[[0, 1, 1]]).item()
    0.6666666865348816
    """
    best = torch.cat([(part @ text.T).argmax(dim=1) for part in image.split(tile)])
    return (best // (len(text) // len(image)) == torch.arange(len(image), device=image.device)).float().mean()


def finish(run: Session) -> None:
    """Write the finished folder: weights, configs, how images are prepared, and last the manifest."""
    config, out = run.config, run.out
    weights = run.final_weights()  # all processes: they hold parts
    bad = run.loader_state()["bad"]
    if not run.accelerator.is_main_process:
        return
    model_config = cast(StudentModelConfig, copy.deepcopy(run.student.config))
    student = Student(model_config)  # a plain one: no adapters, hooks or shards
    if config.lora_rank:
        adapters = add_lora(student, rank=config.lora_rank, alpha=config.lora_alpha)
        student.load_state_dict(weights)
        merge_lora(student, adapters)
    else:
        student.load_state_dict(weights)
    student.save_pretrained(out)
    run.transform.save(out)
    write_manifest(
        out,
        "student",
        config=config.settings(),
        fingerprint=tensors_fingerprint(student.state_dict()),
        teacher_fingerprint=run.banks[0].teacher_fingerprint,
        prompt=run.banks[0].manifest["teacher"]["prompt"],  # what use must put before each text, too
        bank_fingerprints=run.origin["banks"],
        text_bank_fingerprints=run.origin["text_banks"],
        tower_fingerprint=run.origin["tower"],
        teacher_dim=run.banks[0].dim,
        projection_dim=student.config.projection_dim,
        image_size=student.config.image_size,
        num_parameters=sum(p.numel() for p in student.parameters()),
        num_samples=run.loader.num_samples,
        kinds=wanted_kinds(run.banks, config.mix),
        steps=run.step,
        best_score=run.best if config.val_bank else None,
        bad_images=bad,
    )
