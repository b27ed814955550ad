"""The settings of `train-teacher` and `join-teachers`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip.config import PRECISIONS, Texts, Weights, check_choice, check_positive, to_dict
from llm2clip.data.config import SourceConfig
from llm2clip.errors import UsageError, setting

ATTENTIONS = ("two-way", "causal")
POOLINGS = ("mean", "last-token", "weighted")
TUNINGS = ("lora", "full", "frozen")
POSITIVES = ("captions", "same")
CAPTIONS_TASK = "captions"
SPEED_FIELDS = ("out", "workers", "micro_batch_size", "gradient_checkpointing", "save_every", "eval_every")
"""Fields that do not decide what is learned (beyond rounding), so a run may go on with other values of them."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(SourceConfig):
    """Train an LLM to tell captions apart: captions of one image are pulled together, all others pushed away."""

    data: tuple[str, ...] = ()
    """Sources of captions, one or several: a path, glob or brace range ending in .tar .csv .tsv .jsonl .json .parquet
    or .arrow, a folder, or hf:org/name[:split]; images are not read. May be left out if there are --text-pairs."""
    model: str
    """The LLM: a local folder or a Hub id of any decoder in transformers."""
    out: Path
    """Folder of the teacher; made if it is not there."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub `model`."""
    join: tuple[str, ...] = ()
    """Encoders whose vectors go behind the trained LLM's, as join-teachers does: with few images the CLIP whose tower
    will be trained, for what its text half knows already (docs/few-images.md)."""
    join_revisions: tuple[str, ...] = ()
    """Branch, tag or commit of each of `join`, in their order ("main" for one that is a local folder)."""
    trust_remote_code: bool = False
    """Run Python code that comes with `model`. Only for sources you trust."""

    text_pairs: tuple[str, ...] = ()
    """JSONL files of text triplets, one task a file: `query`, `positive`, and `negative`, `instruction` if any."""
    instructions: Texts = field(default_factory=dict)
    """Instruction put before the queries of a task, by file stem ("nli=Find an entailed sentence."); beats the file."""
    caption_instruction: str = "Given a caption, retrieve a similar relevant caption."
    """Instruction before the query captions in training (paper, section 3); empty for none. Never used in encoding."""
    source_weights: Weights = field(default_factory=dict)
    """How often a batch comes from each task, by file stem; "captions" is `--data`. By default by size."""
    pair_weights: Weights = field(default_factory=dict)
    """Which kinds of caption may pair, and how often: short+long=2 short+short=1. By default any two captions."""
    positives: str = "captions"
    """captions: the positive is another caption of the image; same: the same caption again under other dropout."""
    random_negative: bool = True
    """Without explicit negatives, add one random caption of another image for each query (official recipe)."""
    mask_duplicates: bool = True
    """Do not push away captions equal to the query or its positive up to case and punctuation, or of its image."""

    attention: str = "two-way"
    """two-way: every token sees the whole caption; causal: as the LLM was pretrained."""
    pooling: str = "mean"
    """How token states become one vector: mean, last-token, weighted (later tokens count more)."""
    max_length: int = 512
    """Tokens of a caption that are read; what is longer is cut."""
    chat_template: bool = False
    """Wrap each caption as a user's turn of the tokenizer's chat template; the turn's header is not pooled."""
    tuning: str = "lora"
    """lora: low-rank adapters on every linear layer, merged at the end; full: every weight; frozen: none."""
    adaptor_layers: int = 0
    """Residual layers x + GELU(Wx + b) behind the pooling, trained too and kept in the teacher (paper, table 8)."""
    lora_rank: int = 16
    """Rank of the adapters (paper, section 3)."""
    lora_alpha: float = 32
    """Scale of the adapters: alpha / rank multiplies them."""
    lora_dropout: float = 0.05
    """Dropout before the adapters, as a fraction."""
    attention_dropout: float = 0.0
    """Dropout of attention weights in training, as a fraction; `--positives same` needs some (0.3)."""
    quantize: bool = False
    """Hold the frozen base weights in 4 bits while training (needs a GPU and `pip install 'llm2clip[quantize]'`)."""
    save_adapter: bool = False
    """Also save the adapter by itself, in `OUT/adapter` (peft format)."""

    scale: float = 50.0
    """The cosine is multiplied by this in the loss (1 / temperature; official code)."""
    steps: int | None = None
    """Optimizer steps; give this or --epochs."""
    epochs: float | None = None
    """Passes over the data; if neither this nor --steps is given, 1, or 100 steps where there are few images."""
    batch_size: int = 64
    """Pairs a step, over all processes; every other pair of the step is a negative."""
    micro_batch_size: int | None = None
    """Texts in memory at once on each process; below the batch, gradients are cached, with the same result."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; it falls linearly to 0. By default 2e-4, as in the paper; adapters on few images
    take more, the narrower the LLM is (0.002 at most)."""
    warmup_steps: int = 300
    """Steps until the peak; never more than a tenth of all steps."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: str = "auto"
    """fp32, bf16 or fp16 arithmetic, or auto: bf16 where the hardware has it, else fp16 on a CUDA GPU and fp32 on a
    CPU. LoRA holds the frozen weights in it too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    workers: int = 0
    """Processes that tokenise ahead."""
    save_every: int | None = None
    """Steps between checkpoints, from which a killed run goes on. By default a tenth of the run, at most 500."""
    seed: int = 0
    """Source of all randomness."""

    mntp: bool = False
    """First teach the LLM to use two-way attention: masked next-token prediction on captions and `--mntp-text`."""
    mntp_steps: int = 1000
    """Steps of masked next-token prediction."""
    mntp_batch_size: int = 32
    """Texts a step of masked next-token prediction, over all processes (official recipe)."""
    mntp_mask: float = 0.2
    """Fraction of tokens masked (official recipe)."""
    mntp_mask_token: str | None = None
    """Token that stands for a masked one; by default the tokenizer's own, else "_"."""
    mntp_text: tuple[str, ...] = ()
    """Plain text files, a text a line, mixed with the captions (the paper uses wikitext-103)."""

    eval_data: tuple[str, ...] = ()
    """Sources of held-out captions for the retrieval scores before and after; else a sample of `--data`."""
    eval_images: int = 1000
    """Images in those scores."""
    eval_every: int = 0
    """Steps between such scores in training, noted in `log.jsonl`; 0 for before and after only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_each("join_revisions", self.join_revisions, self.join)
        check_choice(setting("attention"), self.attention, ATTENTIONS)
        check_choice(setting("pooling"), self.pooling, POOLINGS)
        check_choice(setting("tuning"), self.tuning, TUNINGS)
        check_choice(setting("precision"), self.precision, PRECISIONS)
        check_choice(setting("positives"), self.positives, POSITIVES)
        names: tuple[str, ...] = ("max_length", "lora_rank", "lora_alpha", "scale", "learning_rate", "max_grad_norm")
        names += ("mntp_steps", "mntp_batch_size", "mntp_mask", "steps", "epochs", "micro_batch_size", "save_every")
        check_positive(**{name: value for name in names if (value := getattr(self, name)) is not None})
        for name in ("adaptor_layers", "eval_every", "warmup_steps", "weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise UsageError(f"{setting(name)} is {getattr(self, name)}; it must be 0 or more")
        for name in ("lora_dropout", "attention_dropout", "mntp_mask"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{setting(name)} is {getattr(self, name)}; it must be in [0, 1)")
        if self.eval_images < 2:
            raise UsageError(f"{setting('eval_images')} is {self.eval_images}; telling images apart takes 2 or more")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"{setting('seed')} is {self.seed}; it must be in 0..{2**32 - 1}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        lora = self.tuning == "lora"
        dropout = self.attention_dropout or (lora and self.lora_dropout)
        steps, epochs = f"{setting('steps')} {self.steps}", f"{setting('epochs')} {self.epochs}"
        data, text_pairs = setting("data", ("SOURCE",)), setting("text_pairs", ("FILE.jsonl",))
        batch_size, quantize, mntp = setting("batch_size"), setting("quantize"), setting("mntp")
        lora_tuning, mntp_text = setting("tuning", "lora"), setting("mntp_text", ("FILE",))
        wrong = {
            f"nothing to train on: give {data} or {text_pairs}": not self.data and not self.text_pairs,
            f"{steps} and {epochs} exclude each other; give one": self.steps and self.epochs,
            f"{batch_size} is {self.batch_size}; a query needs another's text as negative, give 2 or more": (
                self.batch_size < 2
            ),
            f"{setting('tuning', 'frozen')} leaves nothing to train; add {setting('adaptor_layers', 4)}": (
                self.tuning == "frozen" and not self.adaptor_layers
            ),
            f"{quantize} trains adapters only; add {lora_tuning}": self.quantize and not lora,
            f"{quantize} and {mntp} exclude each other: that step needs the full weights": self.quantize and self.mntp,
            f"{setting('join')} and {setting('adaptor_layers')} exclude each other": self.join and self.adaptor_layers,
            f"{setting('save_adapter')} needs {lora_tuning}": self.save_adapter and not lora,
            f"{setting('positives', 'same')} needs dropout to tell the two apart; add "
            f"{setting('attention_dropout', 0.3)}": (self.positives == "same" and not dropout),
            f"{mntp} has nothing to read; give {data} or {mntp_text}": (
                self.mntp and not self.data and not self.mntp_text
            ),
        }
        for message, applies in wrong.items():
            if applies:
                raise UsageError(message)

    @property
    def work(self) -> Path:
        """The folder in `out` for what a finished teacher has no use of."""
        return Path(self.out) / "work"

    @property
    def task_names(self) -> list[str]:
        """The tasks, in order: "captions" if there is `data`, then the stem of each file of `text_pairs`."""
        return [*([CAPTIONS_TASK] if self.data else []), *(Path(file).stem for file in self.text_pairs)]

    @property
    def load_dtype(self) -> str:
        """The dtype the base weights are held in: frozen ones in the run's precision, trained ones in fp32."""
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[
            "fp32" if self.tuning == "full" else self.precision
        ]

    @property
    def needs_images(self) -> bool:
        """Captions are all that it learns from."""
        return False

    def settings(self) -> dict[str, object]:
        """The fields that decide what is learned, JSON-ready: what `run.json` and the manifest record."""
        return {key: value for key, value in to_dict(self).items() if key not in SPEED_FIELDS}


def for_eval(config: TeacherConfig) -> SourceConfig:
    """The source settings of `--eval-data`: as for `--data`, other specs, whole."""
    names = [f.name for f in dataclasses.fields(SourceConfig)]
    return SourceConfig(**{**{name: getattr(config, name) for name in names}, "data": config.eval_data, "split": None})


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Make one teacher of several: a caption's vector is theirs, each of unit length, one behind the other.

    An LLM and the text half of the CLIP whose tower will be trained: the paper's best scheme (table 9, d).
    """

    teachers: tuple[str, ...]
    """Two or more, folders or Hub ids: a teacher, an LLM, any SentenceTransformer, or a CLIP or SigLIP (its texts)."""
    out: Path
    """Folder of the joined teacher; made if it is not there."""
    weights: tuple[float, ...] = ()
    """Length of each teacher's part of the vector, in their order; by default 1 for all."""
    revisions: tuple[str, ...] = ()
    """Branch, tag or commit of each teacher, in their order ("main" for one that is a local folder)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teachers. Only for sources you trust."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            UsageError: for an impossible value or combination.
        """
        if len(self.teachers) < 2:
            raise UsageError(f"{setting('teachers')} names {len(self.teachers)}; give two or more to be joined")
        check_one_each("weights", self.weights, self.teachers)
        check_one_each("revisions", self.revisions, self.teachers)
        for weight in self.weights:
            if not (weight > 0 and math.isfinite(weight)):
                raise UsageError(f"{setting('weights')} has {weight}; each must be above 0")

    def settings(self) -> dict[str, object]:
        """The fields that decide what is written, JSON-ready."""
        return {key: value for key, value in to_dict(self).items() if key != "out"}


def check_one_each(name: str, values: Sequence[Any], teachers: Sequence[str]) -> None:
    """Raise a UsageError if values are given, and not one for each of the teachers."""
    if values and len(values) != len(teachers):
        raise UsageError(f"{setting(name)} has {len(values)} values for {len(teachers)} teachers; give one each")
