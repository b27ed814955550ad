"""The settings of `train-student`: the bank and the tower it teaches, and how."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm2clip.config import PRECISIONS, Weights, check_choice, check_positive, to_dict
from llm2clip.errors import UsageError, setting
from llm2clip.eval.benchmarks import check_benchmarks

LOSSES = ("softmax", "sigmoid")
"""Rows of `loss.KINDS`; settings import no torch."""
OPTIMIZERS = ("adamw", "muon")
INITS = ("pretrained", "random")
INHERIT = ("auto", "none")
TRACKERS = ("auto", "none", "tensorboard", "wandb", "trackio")
SPEED_FIELDS: tuple[str, ...] = ("out", "workers", "micro_batch_size", "gradient_checkpointing", "compile")
SPEED_FIELDS += ("save_every", "tracker", "inherit_cache")
"""Fields that do not decide what is learned (beyond rounding), so a run may go on with other values of them."""


def readers() -> int:
    """Four processes, or as many as the cores that this one may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return min(4, len(allowed(0)) if allowed else os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Fine-tune a vision tower, so that images land where the teacher's vectors of their captions are.

    Defaults are those of the paper and its released code (arXiv 2411.04997, stage 2), unless a line says otherwise.
    """

    bank: tuple[str, ...]
    """Banks made by build-bank, one or several; several are mixed by size, or by --bank-weights."""
    tower: str
    """The vision tower: a local folder or a Hub id of CLIP, SigLIP, DINOv2, ViT, timm's EVA02 and others."""
    out: Path
    """Folder of the student; made if it is not there."""
    tower_revision: str | None = None
    """Branch, tag or commit of a Hub tower."""
    init: str = "pretrained"
    """pretrained: the tower's weights; random: only its shape, for training from scratch."""
    image_size: int | None = None
    """Side of the images in pixels; by default the tower's own. Another one interpolates its positions."""
    dim: int | None = None
    """Width of the space that images and captions share. By default the width of what is inherited, or 1280 as in the
    paper; beyond what is inherited, dimensions start from random weights."""
    adaptor_blocks: int = 4
    """Residual blocks of the adaptor between the teacher's vectors and the shared space."""

    inherit: str = "auto"
    """auto: the student starts as the CLIP or SigLIP that its tower is half of, where it is: the adaptor first learns
    what the tower's own text half says of captions; none: from a random adaptor, as in the paper."""
    inherit_kinds: tuple[str, ...] = ()
    """Kinds of caption to inherit from, cut where they are too long for the text half. By default all captions of at
    most 32 tokens."""
    inherit_bank: tuple[str, ...] = ()
    """Banks of further captions to inherit from, made by build-bank --text-only: text is what inheritance lacks, and
    it needs no images."""
    inherit_cache: str | None = None
    """Folder where what was inherited is kept for other runs of the same tower, banks and seed (in the adaptor's size).
    By default it is kept while the run is under way."""
    inherit_noise: float | None = None
    """Length of what is added at random to the teacher's unit vectors of inherited captions: what lies near a caption,
    such as other words for it and other languages, is then taken for the same. By default 0.2."""
    keep: float | None = None
    """Weight of the distance between images' vectors and those of the tower before it learned. By default 1 where
    something is inherited and the tower learns; 0 lets it forget."""
    keep_text: float | None = None
    """Weight of the distance between inherited captions' vectors and what the tower's text half says of them. By
    default 4; 0 lets the adaptor forget."""

    mix: Weights = field(default_factory=dict)
    """How often an image's caption is of each kind: short=0.5 long=0.5. By default all kinds alike."""
    captions_per_image: int = 1
    """Captions of each image in a step, all of them right answers to it."""
    bank_weights: tuple[float, ...] = ()
    """How often an image comes from each bank, in the order of --bank. By default by size."""
    min_crop: float = 0.9
    """Smallest area of the random crop, as a part of the image; 1 crops nothing at random."""
    max_bad_fraction: float = 0.05
    """Share (0..1) of unreadable images that are replaced and counted; above it the run stops."""

    loss: str = "softmax"
    """softmax: CLIP's symmetric loss; sigmoid: SigLIP's, of each pair alone."""
    label_smoothing: float = 0.0
    """Part of the target spread over all captions of the batch (softmax only)."""
    steps: int | None = None
    """Optimizer steps; give this or --epochs."""
    epochs: float | None = None
    """Passes over the images; if neither this nor --steps is given, 4, or 160 steps where there are few images."""
    batch_size: int | None = None
    """Images a step, over all processes; captions of the others are an image's negatives, equal ones left out. By
    default 4096, as in the paper, or 128 where there are few images; never more than there are."""
    micro_batch_size: int | None = None
    """Images in the tower at once on each process; below the batch, gradients are cached, with the same
    result, but for BatchNorm that learns."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step. It adds no negatives: a larger --batch-size does."""

    optimizer: str = "adamw"
    """adamw; or muon for the hidden matrices, with AdamW for the rest."""
    learning_rate: float = 1e-5
    """Peak learning rate; it falls to 0 along a cosine."""
    adaptor_learning_rate: float = 3e-4
    """Peak learning rate of the adaptor, the projection and the scale; the released code has 1e-5 for them too, and 20
    passes over 13 million images."""
    warmup_steps: int = 0
    """Steps of linear rise to the peak."""
    adaptor_warmup_steps: int = 0
    """First steps in which the tower is frozen and only the fresh parts learn."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases, norms and the scale have none."""
    layer_decay: float = 0.85
    """The learning rate of a tower block is this times that of the block after it."""
    max_grad_norm: float = 5.0
    """Gradients are scaled down to this norm."""
    unlocked_blocks: int | None = None
    """Train only the tower's last N blocks and what follows them; 0 locks the whole tower. By default all train,
    or none in a run of few images (below 5,000) whose length is left open."""
    lora_rank: int = 0
    """Train the tower's blocks through low-rank adapters of this rank, merged at the end; 0 trains the weights."""
    lora_alpha: float = 32
    """Scale of the adapters: alpha / rank multiplies them."""
    patch_dropout: float = 0.0
    """Part of each image's patches left out while training (FLIP): faster, at some loss."""
    ema: float = 0.0
    """Decay per step of a running average of the weights, which then is what is saved; 0 keeps none (0.9999, say)."""

    precision: str = "auto"
    """fp32, bf16 or fp16 arithmetic, or auto: bf16 where the hardware has it, else fp16 on a CUDA GPU and fp32 on a
    CPU. The weights themselves stay in fp32."""
    gradient_checkpointing: bool = False
    """Recompute the tower's activations in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """Compile the tower with torch.compile: slow first step, faster ones after."""
    workers: int = field(default_factory=readers)
    """Processes that read images ahead, for each training process: as many as there are cores, at most 4; 0 reads in
    the training process."""
    save_every: int | None = None
    """Steps between checkpoints, from which a killed run goes on; the last two are kept. By default a tenth of the run,
    at most 500."""
    seed: int = 0
    """Source of all randomness."""
    tracker: str = "auto"
    """Where curves go besides OUT/log.jsonl: tensorboard, wandb, trackio or none; auto is tensorboard if installed."""

    val_bank: str | None = None
    """A bank of held-out images; its retrieval score picks the weights that are saved."""
    val: tuple[str, ...] = ()
    """Named benchmarks (see evaluate --list) whose scores pick the weights; --val-bank then holds the vectors of their
    texts (build-bank --benchmark)."""
    val_root: str | None = None
    """The folder of the benchmark's files, or the one that holds those of each benchmark under its name."""
    val_score: str | None = None
    """The score that picks, as the log names it after val/: urban1k/t2i_r@1, say. By default the mean of R@1 both ways
    over all kinds; of benchmarks the mean of theirs, and of top-1 accuracy."""
    val_every: int | None = None
    """Steps between scores on --val-bank; by default a tenth of the run, at most 500."""
    patience: int | None = None
    """Stop after this many scores on --val-bank without a better one; by default never."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            UsageError: for an impossible value or combination.
        """
        check_choice(setting("loss"), self.loss, LOSSES)
        check_choice(setting("optimizer"), self.optimizer, OPTIMIZERS)
        check_choice(setting("precision"), self.precision, PRECISIONS)
        check_choice(setting("init"), self.init, INITS)
        check_choice(setting("inherit"), self.inherit, INHERIT)
        check_choice(setting("tracker"), self.tracker, TRACKERS)
        positive = ["captions_per_image", "adaptor_blocks", "accumulate", "learning_rate", "layer_decay"]
        positive += ["max_grad_norm", "lora_alpha"]
        positive += "dim adaptor_learning_rate image_size steps epochs micro_batch_size".split()
        positive += ["patience", "save_every", "val_every"]
        given = {name: getattr(self, name) for name in positive}
        check_positive(**{name: value for name, value in given.items() if value is not None})
        self._check_numbers()
        self._check_ranges()
        self._check_combinations()
        self._check_inheritance()

    def _check_numbers(self) -> None:
        for name, value in vars(self).items():
            numbers = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                raise UsageError(f"{setting(name)} is {value}; it takes finite numbers")
        if self.seed >= 2**63:
            raise UsageError(f"{setting('seed')} is {self.seed}; it must be below 2**63")

    def _check_ranges(self) -> None:
        for name in ("label_smoothing", "patch_dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{setting(name)} is {getattr(self, name)}; it must be in [0, 1)")
        steps = ("warmup_steps", "adaptor_warmup_steps", "unlocked_blocks")
        for name in (*steps, "weight_decay", "lora_rank", "workers", "seed", "inherit_noise", "keep", "keep_text"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{setting(name)} is {getattr(self, name)}; it must not be below 0")
        for name in ("min_crop", "layer_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{setting(name)} is {getattr(self, name)}; it must be in (0, 1]")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UsageError(f"{setting('max_bad_fraction')} is {self.max_bad_fraction}; it is a share between 0 and 1")
        if self.batch_size is not None and self.batch_size < 2:
            raise UsageError(
                f"{setting('batch_size')} is {self.batch_size}; it must be at least 2, for there to be a negative"
            )

    def _check_combinations(self) -> None:
        if not self.bank:
            raise UsageError(f"nothing to train on: give {setting('bank', ('DIR',))}, made by llm2clip build-bank")
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"{setting('steps')} {self.steps} and {setting('epochs')} {self.epochs} exclude each other; give one"
            )
        if not isinstance(self.mix, Mapping) or any(weight < 0 for weight in self.mix.values()):
            raise UsageError(
                f"{setting('mix')} is {self.mix!r}; give kinds weights from 0 up, such as "
                f"{setting('mix', {'short': 0.5})}"
            )
        if self.mix and not sum(self.mix.values()):
            raise UsageError(f"{setting('mix')} gives every kind the weight 0; give at least one a weight above 0")
        if self.bank_weights and (len(self.bank_weights) != len(self.bank) or min(self.bank_weights) < 0):
            number = f"{len(self.bank_weights)} weights for {len(self.bank)} banks"
            raise UsageError(f"{setting('bank_weights')} has {number}; give one each, from 0 up")
        if self.lora_rank and self.unlocked_blocks is not None:
            raise UsageError(
                f"{setting('lora_rank')} trains adapters in a locked tower; leave out {setting('unlocked_blocks')}"
            )
        if self.label_smoothing and self.loss == "sigmoid":
            raise UsageError(
                f"{setting('label_smoothing')} is for {setting('loss', 'softmax')}; leave one of the two out"
            )
        check_benchmarks(self.val, self.val_root, flag="val", place="val_root")
        for name in ("patience", "val", "val_score"):
            if getattr(self, name) and self.val_bank is None:
                why = "vectors of its texts" if name == "val" else "scores to wait for"
                raise UsageError(f"{setting(name)} needs {why}; add {setting('val_bank', 'DIR')}")

    def _check_inheritance(self) -> None:
        if self.inherit == "auto" and self.init == "pretrained":
            return
        why = setting("inherit", "none") if self.inherit == "none" else setting("init", "random")
        for name, value in self.about_inheritance().items():
            raise UsageError(f"{setting(name, value)} is about what is inherited; leave it or {why} out")

    def about_inheritance(self) -> dict[str, object]:
        """The settings that were given and have an effect only where something is inherited."""
        names = ("inherit_kinds", "inherit_bank", "inherit_cache", "inherit_noise", "keep", "keep_text")
        return {name: value for name in names if (value := getattr(self, name))}

    def settings(self) -> dict[str, object]:
        """The fields that decide what is learned, JSON-ready: what `run.json` and the manifest record."""
        return {key: value for key, value in to_dict(self).items() if key not in SPEED_FIELDS}
