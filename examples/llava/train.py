"""LLaVA-1.5's two stages of training: `python -m examples.llava.train --help`.

Stage 1 trains the projector on captions, stage 2 projector and LLM (or adapters in it) on instructions; the tower is
frozen in both.
"""

from __future__ import annotations

import importlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.llava.conversations import Collator, read_conversations
from examples.llava.make_llava import run
from llm2clip.artifacts import is_complete, open_output, read_json, read_manifest, write_manifest
from llm2clip.config import check_choice, check_positive, to_dict
from llm2clip.errors import UsageError, setting
from llm2clip.hub import quiet_transformers
from llm2clip.student.tower import checkpoint_activations

logger = logging.getLogger("llm2clip")
BATCH = {1: 256, 2: 128}
RATES = {1: 1e-3, 2: 2e-5}
CHECKPOINTS = "checkpoints"
LORA_RATE, LORA_DROPOUT = 2e-4, 0.05
ADAPTED = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""LoRA's places, in the LLM alone."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a LLaVA's projector (stage 1), or projector and LLM (stage 2); defaults are LLaVA-1.5's."""

    model: Path
    """The LLaVA: a folder of make_llava for stage 1, of stage 1 for stage 2."""
    data: Path
    """Conversations in LLaVA's JSON: blip_laion_cc_sbu_558k.json, llava_v1_5_mix665k.json, or your own."""
    images: Path
    """What the images' paths in it begin in."""
    out: Path
    """Folder to write; made if it is not there. The same command after a kill goes on from the last checkpoint."""
    stage: int
    """1: captions, the projector alone. 2: instructions, projector and LLM."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    batch_size: int | None = None
    """Conversations a step, over all processes; by default 256 in stage 1 and 128 in stage 2."""
    micro_batch_size: int = 16
    """Conversations that a process computes at once."""
    learning_rate: float | None = None
    """The peak; by default 1e-3 in stage 1, 2e-5 in stage 2, 2e-4 with LoRA."""
    warmup: float = 0.03
    """Part of the steps in which the rate rises; then it falls along a cosine to 0."""
    lora_rank: int = 0
    """In stage 2: train adapters of this rank in place of the whole LLM (128 in LLaVA); merged when saved."""
    max_length: int = 2048
    """Tokens of a conversation; what is longer is cut at its end. An image is never cut."""
    blind: bool = False
    """Train without the images: what is then answered right needs no eyes."""
    gradient_checkpointing: bool = True
    """Compute the LLM's activations anew in the backward pass, which takes less memory."""
    save_every: int = 500
    """Steps between checkpoints."""
    workers: int = 4
    """Processes that load images; 0 loads them in the training's own."""
    seed: int = 0
    """Of the order of samples, and of adapters."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            UsageError: for an impossible value or combination.
        """
        check_choice(setting("stage"), str(self.stage), ("1", "2"))
        optional = ("steps", "batch_size", "learning_rate")
        positive = ["micro_batch_size", "max_length", "save_every", "epochs"]
        positive += [name for name in optional if getattr(self, name) is not None]
        check_positive(**{name: getattr(self, name) for name in positive})
        if not 0 <= self.warmup < 1:
            raise UsageError(f"{setting('warmup')} is {self.warmup}; it is a part of all steps, in [0, 1)")
        for name in ("lora_rank", "workers", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{setting(name)} is {getattr(self, name)}; it must not be below 0")
        if self.lora_rank and self.stage == 1:
            raise UsageError(f"{setting('lora_rank')} is of stage 2: stage 1 trains the projector alone")
        if self.blind and self.stage == 1:
            raise UsageError(f"{setting('blind')} is of stage 2: a blind model has no use for a projector")


def train(config: TrainConfig) -> Path:
    """Run one stage and return its folder.

    Raises:
        UsageError: for a folder that is no LLaVA, or settings that do not fit each other.
        SourceError: for data that cannot be read.
    """
    out = Path(config.out)
    speed = ("out", "workers", "micro_batch_size", "gradient_checkpointing", "save_every")
    settings = {key: value for key, value in to_dict(config).items() if key not in speed}
    with open_output(out, "llava", config=settings, shared=True):  # all processes of a run
        if is_complete(out):
            return out
        read_manifest(config.model, "llava")
        samples = read_conversations(config.data, config.images, blind=config.blind)
        if config.stage == 1 and (without := [sample for sample in samples if not sample.images]):
            logger.warning("%d samples without an image left out: stage 1 trains what sees", len(without))
            samples = [sample for sample in samples if sample.images]
        trainer = new_trainer(config, samples)
        with quiet_transformers():
            trainer.train(resume_from_checkpoint=last_checkpoint(out))
        save(trainer, out, dtype=getattr(torch, read_json(config.model / "config.json")["dtype"]))
        if trainer.is_world_process_zero():
            log = [line for line in trainer.state.log_history if "loss" in line]
            write_manifest(out, "llava", config=settings, samples=len(samples), log=log)
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    return out


def new_trainer(config: TrainConfig, samples: list[Any]) -> Any:
    """The Trainer of transformers with the model, the data and the recipe.

    Raises:
        UsageError: if the batch cannot be cut into micro-batches.
    """
    from transformers import AutoProcessor, Trainer, TrainingArguments

    in_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    model = open_model(config, frozen_dtype=torch.bfloat16 if in_bf16 else torch.float32)
    processor = AutoProcessor.from_pretrained(config.model)
    arguments = TrainingArguments(
        output_dir=str(config.out / CHECKPOINTS),
        per_device_train_batch_size=config.micro_batch_size,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        learning_rate=config.learning_rate or (LORA_RATE if config.lora_rank else RATES[config.stage]),
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,  # below 1: a part of all steps
        weight_decay=0.0,
        bf16=in_bf16,
        logging_steps=1,
        logging_first_step=True,
        save_steps=config.save_every,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=config.workers,
        ddp_find_unused_parameters=config.stage == 2,  # a batch of text alone leaves the projector out
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    at_once = config.micro_batch_size * arguments.world_size
    batch = config.batch_size or BATCH[config.stage]
    if batch % at_once:
        raise UsageError(
            f"{setting('batch_size')} {batch} is no multiple of {at_once}, what {arguments.world_size} processes "
            f"compute at once; give {setting('batch_size', batch // at_once * at_once or at_once)}"
        )
    arguments.gradient_accumulation_steps = batch // at_once
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=Collator(processor, plain=config.stage == 1, max_length=config.max_length),
        processing_class=processor,
    )


def open_model(config: TrainConfig, *, frozen_dtype: torch.dtype) -> Any:
    """The LLaVA, what learns in float32 and the rest in `frozen_dtype`."""
    # Trainer looks for its checkpoint's weights under other names than save_pretrained gives a LLaVA's, and finds none
    begun = None if config.lora_rank else last_checkpoint(config.out)
    # what has learned is not rounded
    model = open_weights(Path(begun or config.model), dtype=torch.float32 if begun else frozen_dtype)
    model.requires_grad_(False)
    llm, projector = model.model.language_model, model.model.multi_modal_projector
    learning = [projector] if config.stage == 1 else [projector, llm, model.lm_head]
    if config.gradient_checkpointing:
        checkpoint_activations(llm)
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(config.seed)
        adapters = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            lora_dropout=LORA_DROPOUT,
            target_modules=ADAPTED,
            modules_to_save=["multi_modal_projector"],
        )
        model, learning = get_peft_model(model, adapters), []
    for part in learning:
        part.requires_grad_(True)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else frozen_dtype)
    return model


def open_weights(folder: Path, *, dtype: Any) -> Any:
    """The LLaVA in a folder."""
    from transformers import AutoModelForImageTextToText

    if read_json(folder / "config.json")["vision_config"]["model_type"] == "timm_tokens":
        importlib.import_module("llm2clip.export.timm_tokens")  # AutoModel knows the class from then on
    with quiet_transformers(bars=False):
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint of the run in `out`, if there is one."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = out / CHECKPOINTS
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def save(trainer: Any, out: Path, *, dtype: torch.dtype) -> None:
    """Write the model as the LLaVA it began as, in the precision of its folder, with its processor."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model, weights = model.merge_and_unload().to(dtype), None
    else:
        model.to(dtype)
        weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        model.save_pretrained(out, state_dict=weights)
        trainer.processing_class.save_pretrained(out)


if __name__ == "__main__":
    run(TrainConfig, train)
