"""What a training run holds: banks, student, optimizer and average, begun anew or where a checkpoint left them."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from llm2clip.bank.reader import Bank
from llm2clip.config import to_dict
from llm2clip.data.bad import BadSamples
from llm2clip.errors import UsageError, setting
from llm2clip.journal import Journal, flat
from llm2clip.outlook import needs, training_bytes
from llm2clip.student.accelerator import compile_tower, fail_together
from llm2clip.student.checkpoint import (
    KEPT,
    load_best,
    load_checkpoint,
    restore_state,
    save_best,
    save_checkpoint,
    state_tensors,
    tensors_fingerprint,
    whole_weights,
)
from llm2clip.student.config import StudentConfig
from llm2clip.student.data import BankDataset, Batch
from llm2clip.student.ema import Average
from llm2clip.student.inheritance.inherit import TextHalf, inherit, open_text_half
from llm2clip.student.inheritance.keep import OwnView
from llm2clip.student.loader import BankLoader
from llm2clip.student.mix import check_banks, check_teacher
from llm2clip.student.optim import build_optimizer
from llm2clip.student.start import open_tower, open_transform, start_student
from llm2clip.student.tower import checkpoint_activations
from llm2clip.student.trainable import choose_what_learns
from llm2clip.student.validate import open_evaluators, validate

logger = logging.getLogger("llm2clip")
PAPER_DIM = 1280
"""Width of the shared space where nothing is inherited (paper, section 6.2)."""
KEEP = 1.0
"""Costs a forward of the frozen tower; brings a point of the mean, four of short captions (docs/student.md)."""
KEEP_TEXT = 4.0
"""Of 1, 4 and 10 the one that kept what was inherited at the least cost in long captions (docs/lab-notes.md)."""
MOST_REMEMBERED = 1 << 28
"""Numbers of the tower's own view of images that are kept in memory, where crops are always the same: 512 MiB."""
DEFAULT_EPOCHS = 4
"""Passes over the images where neither --steps nor --epochs is given (paper, section 6.2)."""


class Session:
    """Everything a training run holds; `llm2clip.student.train` is what it does with it.

    Args:
        config: the run's settings.
        accelerator: from `llm2clip.student.accelerator`.

    Attributes:
        step: optimizer steps done.
        total_steps: steps in all.
        model: the student as accelerate prepared it; call it, so that its hooks run.
        student: the student itself.
        optimizer: as accelerate prepared it.
        average: the running average of the student's weights, if there is one.
        frozen: names of the tower's parameters that do not learn yet, while the adaptor warms up.
        best: best score on --val-bank so far, and `waited`: scores since then.
    """

    def __init__(self, config: StudentConfig, accelerator: Any) -> None:
        assert config.batch_size is not None and config.precision != "auto"
        self.config, self.accelerator, self.out = config, accelerator, Path(config.out)
        self.step, self.best, self.waited = 0, -1.0, 0
        with fail_together(accelerator, self.out):  # before anything is written
            self._open_data(config.batch_size)
            self._build_student()
        self._begin()
        images = config.batch_size * config.accumulate
        self.journal = Journal(
            accelerator,
            self.out,
            total=self.total_steps,
            step=self.step,
            images=images,
            estimate=lambda: needs(accelerator.device, self._disk()),
        )
        accelerator.init_trackers("llm2clip", config=flat(to_dict(config)))

    def _open_data(self, batch_size: int) -> None:
        config = self.config
        self.banks = [Bank.open(folder) for folder in config.bank]
        self.text_banks = [Bank.open(folder) for folder in config.inherit_bank]
        self.val_bank = Bank.open(config.val_bank) if config.val_bank else None
        check_banks(self.banks)
        for bank in [*self.text_banks, *([self.val_bank] if self.val_bank else [])]:
            check_teacher(bank, self.banks[0])
        if self.val_bank is not None:
            self.evaluators = open_evaluators(self.val_bank, config.val, config.val_root, config.val_score)
        self.tower = open_tower(config.tower, revision=config.tower_revision)
        if self.tower.teacher not in (None, self.banks[0].teacher_fingerprint):
            raise UsageError(
                f"{self.tower} is a student of teacher {self.tower.teacher}, {setting('bank')} {self.banks[0].folder} "
                f"is of {self.banks[0].teacher_fingerprint}; build the bank with the student's own teacher"
            )
        self.transform = open_transform(self.tower, image_size=config.image_size)
        dataset = BankDataset(
            self.banks,
            transform=self.transform,
            batch_size=batch_size,
            seed=config.seed,
            mix=config.mix,
            captions_per_image=config.captions_per_image,
            bank_weights=config.bank_weights,
            min_crop=config.min_crop,
            num_processes=self.accelerator.num_processes,
        )
        self.loader = BankLoader(
            dataset,
            process=self.accelerator.process_index,
            workers=config.workers,
            device=self.accelerator.device,
            max_bad_fraction=config.max_bad_fraction,
        )
        per_epoch = self.loader.batches_per_epoch / config.accumulate
        self.total_steps = config.steps or max(1, round((config.epochs or DEFAULT_EPOCHS) * per_epoch))

    def _build_student(self) -> None:
        config = self.config
        wanted = config.inherit == "auto" and config.init == "pretrained"
        half = open_text_half(self.tower, device=self.accelerator.device) if wanted else None
        if half is not None and config.dim is not None and config.dim < half.width:
            given = f"{setting('dim')} {config.dim} is below the {half.width} dimensions"
            raise UsageError(f"{given} that are inherited; leave it out, or give {setting('inherit', 'none')}")
        torch.manual_seed(config.seed)
        self.student = start_student(
            self.tower,
            teacher_dim=self.banks[0].dim,
            projection_dim=config.dim or self._own_dim(half),
            adaptor_blocks=config.adaptor_blocks,
            loss=config.loss,
            image_size=config.image_size,
            init=config.init,
            transform=self.transform,
        )
        self.origin = {
            "banks": [bank.fingerprint for bank in self.banks],
            "tower": tensors_fingerprint(self.student.tower.state_dict()),
            "text_banks": [bank.fingerprint for bank in self.text_banks],
        }
        self._inherit(half)
        if config.gradient_checkpointing:
            checkpoint_activations(self.student.tower)
        choose_what_learns(
            self.student,
            unlocked_blocks=config.unlocked_blocks,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            patch_dropout=config.patch_dropout,
        )
        if config.compile:
            compile_tower(self.student.tower, device=self.accelerator.device)
        self._optimizer = build_optimizer(
            self.student,
            kind=config.optimizer,
            learning_rate=config.learning_rate,
            fresh_learning_rate=config.adaptor_learning_rate,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )

    def _own_dim(self, half: TextHalf | None) -> int:
        """Width of the shared space where none is asked for: of what goes on or is inherited, or the paper's."""
        if self.tower.whole is not None:
            return int(self.tower.whole[0].config.projection_dim)
        return PAPER_DIM if half is None else half.width

    def _inherit(self, half: TextHalf | None) -> None:
        """Have the student begin as what its tower is half of; the main process does it, the others take its result."""
        config, self.inherited, self.own_view = self.config, None, None
        if half is None:
            for name, value in config.about_inheritance().items():
                given = setting(name, value)
                raise UsageError(f"{given} needs a tower with a text half, which {self.tower} has not; leave it out")
            return
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
        try:
            banks = [*self.banks, *self.text_banks]
            device = self.accelerator.device
            self.student.adaptor.to(device)
            self.inherited = inherit(self.student, half, banks, config, out=self.out, tower=str(self.origin["tower"]))
        finally:
            if self.accelerator.is_main_process:
                self.accelerator.wait_for_everyone()
        keep = KEEP if config.keep is None and config.unlocked_blocks != 0 else config.keep
        if keep:
            self.keep = keep
            fixed = config.min_crop >= 1 and self.loader.num_samples * half.width <= MOST_REMEMBERED
            number = self.loader.num_samples if fixed else 0
            self.own_view = OwnView(self.student, half.width, num_samples=number)

    def _begin(self) -> None:
        """Go on from the last checkpoint if there is one, and hand model and optimizer to accelerate."""
        loaded = load_checkpoint(self.out)
        if loaded is not None:
            if (origin := loaded[1]["origin"]) != self.origin:
                raise UsageError(
                    f"{setting('out')} {self.out} was begun with other contents of {setting('tower')} or "
                    f"{setting('bank')} ({origin}, now {self.origin}); name a new folder"
                )
            self.step, self.best, self.waited = (loaded[1][name] for name in ("step", "best", "waited"))
        self.frozen: set[str] = set()
        if self.step < self.config.adaptor_warmup_steps:  # a tower without gradients costs no backward
            self.frozen = {name for name, p in self.student.tower.named_parameters() if p.requires_grad}
            self.student.tower.requires_grad_(False)
        self._prepare()
        if loaded is None:
            return
        saved, facts = loaded
        restore_state(saved, self.student, [self._optimizer], average=self._average_values())
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if self.accelerator.is_main_process:
            self.loader.restore(facts["loader"])
        logger.info("going on from step %d of %d", self.step, self.total_steps)

    def _prepare(self) -> None:
        self.student.train()  # what transformers loads is in evaluation mode
        self.model, self.optimizer = self.accelerator.prepare(self.student, self._optimizer)  # in wrappers
        if self.accelerator.is_fsdp2:
            for method in ("get_image_features", "get_text_features"):  # scores call them, past forward
                register_fsdp_forward_method(self.student, method)
        if self.accelerator.num_processes == 1:  # torchrun with one process: data parallel hooks would only cost
            self.model = getattr(self.model, "module", self.model)
        self.average = Average(self.student, decay=self.config.ema) if self.config.ema else None

    def _disk(self) -> int:
        """Bytes on the disk that the run takes at most."""
        sizes = [
            (w.numel() * w.element_size(), w.requires_grad or name.removeprefix("tower.") in self.frozen)
            for name, w in self.student.named_parameters()
        ]
        whole = sum(size for size, _ in sizes)
        return training_bytes(
            sum(size for size, learns in sizes if learns),
            whole * (2 if self.val_bank else 1),  # the best so far, and the finished one
            checkpoints=KEPT + 1,
            steps=self.total_steps,
            others=whole if self.average else 0,
        )

    def to_keep(self, batch: Batch, *, place: int) -> dict[str, Any]:
        """What `Objective` holds the vectors of a batch against, if anything; the batch is the run's `place`-th."""
        config, kept = self.config, dict[str, Any]()
        if self.own_view is not None:
            with self.accelerator.autocast():
                images = [self.own_view(*part) for part in self._micro(batch.pixels, batch.samples)]
            kept.update(keep=self.keep, images=torch.cat(images))
        keep_text = KEEP_TEXT if config.keep_text is None else config.keep_text
        if self.inherited is not None and keep_text:
            random = np.random.default_rng([config.seed, place, self.accelerator.process_index])
            chosen = random.integers(len(self.inherited), size=len(batch))
            texts = self.inherited.draw(random, chosen, batch.text_embeds.device)
            kept.update(keep_text=keep_text, texts=texts)
        return kept

    def _micro(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tensors of a batch, in parts of as many images as go through the tower at once."""
        size = self.config.micro_batch_size or len(tensors[0])
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def thaw(self) -> None:
        """Let the tower learn after the adaptor's warm-up; data parallel hooks are made anew, with its parameters."""
        for name, parameter in self.student.tower.named_parameters():  # by name: FSDP2 has put others in their place
            parameter.requires_grad_(name in self.frozen)
        self.frozen.clear()
        self.student.train()  # norms that had to stay as they were
        if self.config.compile:
            torch.compiler.reset()  # torch 2.9 would go on with what it compiled for a frozen tower
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            del self.model
            self.accelerator.free_memory()  # it holds the old hooks, and the optimizer
            self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
            self.model = self.accelerator.prepare_model(self.student)

    def batches(self) -> Iterator[list[Batch]]:
        """What each step that is left takes: `--accumulate` batches."""
        number = self.config.accumulate
        batches = self.loader.batches(self.step * number, self.total_steps * number)
        while group := list(itertools.islice(batches, number)):
            yield group
            group.clear()  # also in the caller's hands: its memory is for batches to come

    def save(self) -> None:
        """Write a checkpoint of this step, after a look at the losses since the last one."""
        self.journal.flush()
        scaler = self.accelerator.scaler
        facts = {
            "origin": self.origin,
            "best": self.best,
            "waited": self.waited,
            "scaler": None if scaler is None else scaler.state_dict(),
            "loader": self.loader_state(),
        }
        tensors = state_tensors(self.student, [self._optimizer], average=self._average_values())
        save_checkpoint(self.out, self.step, tensors, facts, is_main=self.accelerator.is_main_process)

    def loader_state(self) -> dict[str, Any]:
        """Images seen and bad ones, of all processes."""
        states = gather_object([self.loader.state()])
        bad = BadSamples(self.config.max_bad_fraction, quiet=True)
        for state in states:
            bad.merge(state["bad"])
        return {"seen": sum(state["seen"] for state in states), "bad": bad.to_json()}

    def score(self) -> bool:
        """Score the weights as they would be saved on --val-bank, keep the best; whether to stop early."""
        assert self.val_bank is not None
        workers = self.config.workers
        with self._averaged():
            parts = (self.student, self.accelerator, self.val_bank, self.transform, self.evaluators)
            scores = validate(*parts, workers=workers)
            weights = self._weights()
        self.journal.note(self.step, scores)
        self.waited += 1
        value = scores[f"val/{self.config.val_score or 'r@1'}"]
        if value > self.best:
            self.best, self.waited = value, 0
            if self.accelerator.is_main_process:
                save_best(self.out, weights)
        return self.config.patience is not None and self.waited >= self.config.patience

    def final_weights(self) -> dict[str, Tensor]:
        """The weights to save: the best on --val-bank, else the average, else the last.

        All processes call it; only the main one gets them.
        """
        if self.val_bank is None:
            with self._averaged():
                return self._weights()
        return load_best(self.out) if self.accelerator.is_main_process else {}

    def _weights(self) -> dict[str, Tensor]:
        """All weights as they are now; all processes call it, the main one gets them."""
        return whole_weights(self.student, keep=self.accelerator.is_main_process)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it, the running average is in the place of the weights, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied(self.student)

    def _average_values(self) -> dict[str, Tensor] | None:
        return None if self.average is None else self.average.values
