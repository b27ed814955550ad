"""The trainers of stage 1 and of MNTP: the libraries' own, fed in our order, with checkpoints of what is trained."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llm2clip.compat import OwnWeights
from llm2clip.config import save_interval
from llm2clip.errors import LLM2CLIPError, UsageError, setting
from llm2clip.journal import LOG, Journal
from llm2clip.outlook import needs, training_bytes
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.loss import CaptionLoss
from llm2clip.teacher.mixture import BatchOrder, Mixture
from llm2clip.teacher.model import llm
from llm2clip.teacher.reach import freeze_unreached
from llm2clip.teacher.tuning import is_sharded, load_trained, set_attention_dropout, trained_weights

logger = logging.getLogger("llm2clip")
WEIGHTS = "trained.safetensors"
STATE = "trainer_state.json"
WARMUP_SHARE = 0.1


def fit(
    encoder: SentenceTransformer,
    mixture: Mixture,
    order: BatchOrder,
    *,
    config: TeacherConfig,
    probe: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Train `encoder` in place, from the last whole checkpoint of the run if there is one.

    Args:
        probe: gives scores to note in the log every `config.eval_every` steps.
    """
    instructions = {task.name: _query_prompts(encoder, task.instruction) for task in mixture.tasks}
    for prompts in instructions.values():
        check_prompt(encoder, prompts["query"])
    prepare_model(llm(encoder), config, attention_dropout=config.attention_dropout)
    trainer = PairTrainer(
        model=encoder,
        args=arguments(config, order, folder="checkpoints", prompts=instructions),
        loss=CaptionLoss(
            encoder,
            scale=config.scale,
            micro_batch_size=config.micro_batch_size,
            mask_duplicates=config.mask_duplicates,
        ),
        rows=mixture,
        order=order,
    )
    trainer.add_callback(Log(trainer.accelerator, Path(config.out), probe=probe, every=config.eval_every))
    run_trainer(trainer)
    encoder.eval()


def arguments(config: TeacherConfig, order: BatchOrder, *, folder: str, **others: Any) -> Arguments:
    """The arguments of a trainer of `order` with its checkpoints in `folder` of the run's work folder."""
    assert config.learning_rate is not None
    return Arguments(
        output_dir=str(config.work / folder),
        max_steps=order.steps,
        per_device_train_batch_size=order.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=min(config.warmup_steps, int(WARMUP_SHARE * order.steps)),
        lr_scheduler_type="linear",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        save_strategy="steps",
        save_steps=save_interval(config.save_every, order.steps),
        save_total_limit=1,
        logging_steps=max(1, min(10, order.steps // 20)),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        dataloader_num_workers=config.workers,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),
        **others,
    )


def run_trainer(trainer: Any, *, smaller: str = "micro_batch_size") -> None:
    """Run a trainer to its end, from its last whole checkpoint if there is one.

    Args:
        smaller: the setting for the number of texts in memory at once.

    Raises:
        LLM2CLIPError: if the loss is no longer a number, or memory runs out.
    """
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    checkpoint = last_checkpoint(Path(trainer.args.output_dir), num_processes=trainer.args.world_size)
    if checkpoint is not None:
        logger.info("going on from step %s", checkpoint.name.rsplit("-", 1)[1])
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise LLM2CLIPError(
            f"out of memory ({str(error).split('. GPU ')[0].rstrip('.')}); give a smaller {setting(smaller)}, "
            f"{setting('gradient_checkpointing', True)} or, for adapters alone, {setting('quantize', True)}"
        ) from error


def last_checkpoint(folder: Path, *, num_processes: int = 1) -> Path | None:
    """The newest whole checkpoint in `folder`; what a kill left half-written is deleted.

    The trainer writes `trainer_state.json` after everything else, and each process its own random state.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]
    for path in found:
        if _is_json(path / STATE) and all((path / name).exists() for name in states):
            return path
        shutil.rmtree(path, ignore_errors=True)  # several processes may be at it
    return None


def prepare_model(model: Any, config: TeacherConfig, *, attention_dropout: float) -> None:
    """Set what training changes in a model: dropout of attention, recomputed activations."""
    set_attention_dropout(model, attention_dropout)
    if config.tuning == "full":
        freeze_unreached(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def check_prompt(encoder: SentenceTransformer, prompt: str) -> None:
    """Raise if a prompt cannot be told from the caption behind it, so that pooling could not leave it out.

    Raises:
        UsageError: if the prompt's end melts into a caption's first token, or leaves no room for a caption.
    """
    if not prompt:
        return
    whole = encoder.preprocess(["a red disc"], prompt=prompt)
    length = int(whole["prompt_length"])
    alone = encoder.preprocess([prompt])["input_ids"][0, :length]
    if not torch.equal(whole["input_ids"][0, :length], alone):
        raise UsageError(f"the end of the instruction {prompt!r} melts into the caption's first token; reword it")
    limit = encoder.max_seq_length
    if limit is not None and length + 8 > limit:
        raise UsageError(f"the instruction takes {length} of {setting('max_length')} {limit} tokens; shorten it")


def _query_prompts(encoder: SentenceTransformer, instruction: str) -> dict[str, str]:
    """The text before each column: the chat header, if any, and for queries the instruction on a line of its own."""
    header = encoder.prompts.get("caption") or ""
    query = f"{header}{instruction}\n" if instruction else header
    return {"query": query, "positive": header, "negative": header}


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


class Arguments(SentenceTransformerTrainingArguments):  # type: ignore[misc]
    """Trainer arguments for one device a process, also where the process sees several GPUs and torchrun is not used.

    By itself the trainer would share each batch among them by torch's DataParallel, which fails at features that are no
    tensors, such as the length of a prompt.
    """

    @property
    def n_gpu(self) -> int:
        """0 or 1."""
        return min(1, super().n_gpu)


class OrderedTrainer(OwnWeights):
    """What makes of a transformers trainer one of ours: it reads `rows` in an order of batches given for all processes.

    Checkpoints hold the weights in training only: the adapters, or all of them in full tuning.
    """

    model: Any
    args: Any
    accelerator: Any
    data_collator: Any

    def __init__(self, *, rows: Any, order: BatchOrder, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows, self.order = rows, order

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of this process's parts of the batches."""
        self.accelerator.even_batches = False
        loader: DataLoader[Any] = DataLoader(
            self.rows,
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.accelerator.is_available(),
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def save_model(self, output_dir: str | None = None, **options: Any) -> None:
        """Write the weights in training; every process takes part, as each may hold a shard of them."""
        weights = trained_weights(self.model)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, str(folder / WEIGHTS))

    def load_weights(self, folder: Path, model: Any = None) -> None:
        """Read the weights in training."""
        load_trained(model if model is not None else self.model, load_file(folder / WEIGHTS))


class PairTrainer(OrderedTrainer, SentenceTransformerTrainer):  # type: ignore[misc]
    """sentence-transformers' trainer, on a `Mixture`."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No model card: it would read the whole dataset."""


class Log(TrainerCallback):
    """Keeps a `Journal` of what a trainer says, and of the scores that `probe` gives every `every` steps."""

    def __init__(
        self,
        accelerator: Any,
        out: Path,
        *,
        file: str = LOG,
        description: str = "train teacher",
        probe: Callable[[], dict[str, Any]] | None = None,
        every: int = 0,
    ) -> None:
        self.accelerator, self.probe, self.every = accelerator, probe if every else None, every
        # all digits: the learning rate has those of Python
        self.begin = functools.partial(Journal, accelerator, out, file=file, description=description, digits=17)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the journal; the lines of steps that will be taken again are dropped."""
        self.start = time.monotonic()
        weights = list(kwargs["model"].parameters())
        learning, whole = (
            sum(w.numel() * w.element_size() for w in weights if not only or w.requires_grad) for only in (True, False)
        )
        disk = training_bytes(learning, whole, checkpoints=2, steps=state.max_steps)  # the last, and one being written
        estimate = functools.partial(needs, self.accelerator.device, disk)
        self.journal = self.begin(total=state.max_steps, step=state.global_step, estimate=estimate)
        if self.probe is not None and is_sharded(kwargs["model"]):
            self.probe = None
            if self.accelerator.is_main_process:
                logger.warning(
                    "%s: no scores on the way, as one process alone cannot run a sharded model", setting("eval_every")
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step; take the scores when their turn comes."""
        self.journal.advance(state.global_step)
        if self.probe is not None and state.global_step % self.every == 0 and self.accelerator.is_main_process:
            self.journal.note(state.global_step, self.probe())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note loss, learning rate and gradient norm."""
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" in logs:
            self.journal.note(state.global_step, {**logs, "seconds": round(time.monotonic() - self.start, 3)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the journal."""
        self.journal.close()
