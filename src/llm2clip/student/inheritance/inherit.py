"""Inheritance: before any image is seen, the adaptor learns to say of captions what the tower's own text half says.

A CLIP's text half and the teacher both read a caption without its image. Where the adaptor gives, for the teacher's
vector, the vector that the half gives, the student begins as the CLIP that its tower comes from: with its projection,
its temperature, and what it knew of images and words. Training goes on from there, instead of from a random adaptor
that pulls the tower away from all that (docs/student.md has what it brings).

Letters: n captions, T teacher width, E width of the half's vectors, D >= E shared width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from llm2clip.artifacts import atomic_path, fingerprint
from llm2clip.bank.reader import Bank
from llm2clip.config import check_choice
from llm2clip.errors import LLM2CLIPError, UsageError, setting
from llm2clip.hub import one_line_errors
from llm2clip.progress import Progress
from llm2clip.student.checkpoint import tensors_fingerprint
from llm2clip.student.config import StudentConfig
from llm2clip.student.model import Student
from llm2clip.student.optim import cosine_factor
from llm2clip.student.start import Tower, load_model
from llm2clip.two_towers import ClipEncoder

logger = logging.getLogger("llm2clip")
FILE = "inherited.safetensors"
"""In the output while a run is under way: what was inherited, so that it is not computed again."""
MOST_CAPTIONS = 200_000
"""Captions that are inherited from at most: a bound on the time, 25,000 steps."""
BATCH_SIZE, WARMUP_STEPS, NOTED_EVERY = 256, 20, 50
NOISE = 0.2
"""Of 0, 0.2 and 0.3 the one with the best mean: Spanish and Chinese gain some nine points by it (docs/lab-notes.md)."""
HIGHEST_RATE = 2e-3
"""Of learning, for narrow teachers such as the miniature's; wider ones take 1 / T."""
PASSES, FEWEST_STEPS = 32, 300
READ_WELL = 32
"""Tokens of a caption that a CLIP makes much of, whatever its context: captions on the Web are short, and it hardly
gains from more than 20 (Long-CLIP, arXiv 2403.15378). What it says of long ones is no good teacher: in the miniature
inheriting from them too took 6 points."""
ENCODED_AT_ONCE = 1024
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")
SAME_IMAGE = 0.999
"""Cosine from which on two image vectors are of one model."""


class TextHalf:
    """The text half of the model of images and texts that a tower comes from.

    Args:
        encoder: the whole model.

    Attributes:
        width: E.
        projection: [E, W], of the tower's pooled output; the identity where the model has none (SigLIP).
        log_scale: of its temperature, [1].
        bias: that SigLIP adds to its scores, [1], or None.
    """

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder, model = encoder, encoder.model
        layer = getattr(model, "visual_projection", None)
        width = model.config.vision_config.hidden_size
        self.projection: Tensor = torch.eye(width) if layer is None else layer.weight.detach().float().cpu()
        self.width = len(self.projection)
        self.log_scale: Tensor = model.logit_scale.detach().float().cpu().view(1)
        bias = getattr(model, "logit_bias", None)
        self.bias: Tensor | None = None if bias is None else bias.detach().float().cpu().view(1)

    @property
    def fingerprint(self) -> str:
        """Of the whole model's weights and the tokenizer's words."""
        weights = tensors_fingerprint(self.encoder.model.state_dict())
        return fingerprint([weights, sorted(self.encoder.tokenizer.get_vocab().items())])

    @property
    def reads(self) -> int:
        """Tokens that it reads well."""
        return min(self.encoder.context, READ_WELL)

    def fits(self, texts: Sequence[str]) -> list[bool]:
        """Which of the texts it reads well."""
        tokens = self.encoder.tokenizer(list(texts), verbose=False)["input_ids"]
        return [len(ids) <= self.reads for ids in tokens]


def open_text_half(tower: Tower, *, device: str | torch.device = "cpu") -> TextHalf | None:
    """The text half that belongs to a tower; None if it has none, or no tokenizer, which a line in the log says.

    Raises:
        UsageError: if it has one that cannot be used.
    """
    from transformers import MODEL_MAPPING, AutoTokenizer

    if tower.whole is not None:
        return None  # it goes on as it is
    model_class = None if tower.half_of is None else MODEL_MAPPING.get(type(tower.half_of), None)
    if not hasattr(model_class, "get_text_features"):
        logger.info("%s has no text half: there is nothing to inherit, the adaptor starts from random weights", tower)
        return None
    if not set(TOKENIZERS) & set(tower.files):
        logger.info("%s has no tokenizer for its text half: nothing is inherited", tower)
        return None
    with one_line_errors(f"{tower} cannot be used"):
        model, missing = load_model(tower)
        tokenizer = AutoTokenizer.from_pretrained(tower.name, revision=tower.revision, trust_remote_code=False)
    if missing:
        without = f"to start without its text half, give {setting('inherit', 'none')}"
        raise UsageError(f"{tower} lacks weights, such as {min(missing)}; {without}")
    return TextHalf(ClipEncoder(model.to(device), tokenizer, processor=None))


@dataclass
class Inheritance:
    """Captions with the vectors of both: of the teacher, in their banks, and of the tower's text half.

    Attributes:
        banks: that the captions lie in.
        places: int64 [n, 2], of each the number of its bank and its row there.
        own: float16 [n, E] of unit length, what the text half says of them.
        noise: length of what is added at random to a teacher's unit vector when it is drawn.
    """

    banks: Sequence[Bank]
    places: NDArray[np.int64]
    own: Tensor
    noise: float = 0.0

    def __len__(self) -> int:
        return len(self.places)

    def draw(
        self, random: np.random.Generator, chosen: NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The teacher's vectors [b, T], with noise, and the half's own [b, E], float32, of these captions."""
        vectors, own = self.batch(chosen, device)
        noise = torch.from_numpy(random.standard_normal(vectors.shape, np.float32)).to(device)
        return normalize(vectors, dim=-1) + noise * (self.noise / vectors.shape[1] ** 0.5), own

    def batch(self, chosen: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """The same without noise."""
        places = self.places[chosen]
        vectors = np.empty((len(chosen), self.banks[0].dim), np.float32)
        for bank in np.unique(places[:, 0]).tolist():
            here = places[:, 0] == bank
            vectors[here] = self.banks[bank].vectors(places[here, 1])
        own = self.own[torch.from_numpy(chosen)]
        return torch.from_numpy(vectors).to(device), own.to(device).float()


def distance(text: Tensor, own: Tensor) -> Tensor:
    """The mean squared distance [] of vectors [b, D], cut to E dimensions and brought to unit length, from own [b, E].

    >>> distance(torch.tensor([[2.0, 0, 7]]), torch.tensor([[0.0, 1]])).item()  # of what lies at right angles
    2.0
    """
    return (normalize(text[:, : own.shape[1]].float(), dim=-1) - own).square().sum(1).mean()


def inherit(
    student: Student, half: TextHalf, banks: Sequence[Bank], config: StudentConfig, *, out: Path, tower: str
) -> Inheritance:
    """Have `student` begin as the model that its tower comes from; returns the captions it was done on.

    Args:
        student: fresh, its first E dimensions become those of the model, the others stay as they are drawn.
        half: of its tower.
        banks: of the training, and after them those of captions alone.
        out: where the result is kept while the run is under way.
        tower: its fingerprint.

    Raises:
        UsageError: for a kind that no bank has.
        LLM2CLIPError: if the student does not see images as the model does.
    """
    take_over(student, half)
    names = [bank.fingerprint for bank in banks]
    noise = NOISE if config.inherit_noise is None else config.inherit_noise
    model = [config.seed, config.dim, config.adaptor_blocks, noise]
    how = [PASSES, FEWEST_STEPS, WARMUP_STEPS, BATCH_SIZE, HIGHEST_RATE, READ_WELL, MOST_CAPTIONS]  # of this version
    recipe = fingerprint([tower, half.fingerprint, names, len(config.bank), sorted(config.inherit_kinds), *model, *how])
    path = Path(config.inherit_cache) / f"{recipe}.safetensors" if config.inherit_cache else out / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # of runs that share a cache the first computes, and the others wait for it
    with FileLock(path.with_suffix(".lock")) if config.inherit_cache else contextlib.nullcontext():
        found = _kept(path, recipe, student, banks)
        if found is None:
            found = read(half, banks, kinds=config.inherit_kinds, num_training=len(config.bank), seed=config.seed)
            found = replace(found, noise=noise)
            fit(student.adaptor, found, seed=config.seed)
            _keep(path, recipe, student, found)
    return replace(found, noise=noise)


def _keep(path: Path, recipe: str, student: Student, found: Inheritance) -> None:
    weights = {f"adaptor.{name}": value.cpu().contiguous() for name, value in student.adaptor.state_dict().items()}
    tensors = {**weights, "places": torch.from_numpy(found.places), "own": found.own}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"recipe": recipe})


def _kept(path: Path, recipe: str, student: Student, banks: Sequence[Bank]) -> Inheritance | None:
    """What an earlier start of this run, or another process of it, has left."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            if file.metadata().get("recipe") != recipe:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError):
        return None  # cut short by a kill: made anew
    places, own = tensors.pop("places").numpy(), tensors.pop("own")
    student.adaptor.load_state_dict({name.removeprefix("adaptor."): value for name, value in tensors.items()})
    return Inheritance(banks, places, own)


@torch.no_grad()
def take_over(student: Student, half: TextHalf) -> None:
    """Give `student` the model's projection, temperature and, for the sigmoid loss, bias.

    Raises:
        LLM2CLIPError: if it then does not see an image as the model does.
    """
    cast(nn.Linear, student.visual_projection).weight[: half.width].copy_(half.projection)
    student.logit_scale.copy_(half.log_scale)
    student.clamp_logit_scale()
    if student.logit_bias is not None and half.bias is not None:
        student.logit_bias.copy_(half.bias)
    model, size = half.encoder.model, student.config.image_size
    if size != getattr(model.config.vision_config, "image_size", size):
        return  # its positions were interpolated: it sees other images
    was_training = student.training
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours = student.eval().get_image_features(noise)[:, : half.width]
    theirs = model.get_image_features(noise.to(model.device))
    theirs = theirs if isinstance(theirs, Tensor) else theirs.pooler_output
    student.train(was_training)
    cosine = torch.cosine_similarity(ours.cpu(), theirs.float().cpu()).item()
    if not cosine > SAME_IMAGE:
        raise LLM2CLIPError(
            f"the tower does not see images as the {type(model).__name__} it comes from (cosine {cosine:.4f}); "
            f"give {setting('inherit', 'none')}"
        )


def read(
    half: TextHalf, banks: Sequence[Bank], *, kinds: Sequence[str] = (), num_training: int | None = None, seed: int = 0
) -> Inheritance:
    """Captions of banks, each once in its bank, as the half reads them.

    Args:
        kinds: of caption in the first `num_training` banks, whatever their length, and all captions of the other
            banks; empty for all that are short enough for the half to read them well.

    Raises:
        UsageError: if there is no such kind, or no caption is short enough.
    """
    places = _choose(banks, kinds=kinds, num_training=num_training, seed=seed)
    kept, own, cut = [], [], 0
    with Progress(len(places), description="inherit: captions", unit="captions") as progress:
        for start in range(0, len(places), ENCODED_AT_ONCE):
            block = places[start : start + ENCODED_AT_ONCE]
            texts = [banks[bank].text(row) for bank, row in block.tolist()]
            whole = np.ones(len(texts), bool) if kinds else np.array(half.fits(texts))
            cut += len(texts) - int(whole.sum())
            if whole.any():
                kept.append(block[whole])
                fitting = [text for text, fits in zip(texts, whole, strict=True) if fits]
                own.append(torch.from_numpy(half.encoder.encode_text(fitting, batch_size=BATCH_SIZE)).half())
            progress.advance(len(block))
    if not kept:
        raise UsageError(
            f"none of the {len(places):,} captions has at most {half.reads} tokens, which the tower's text half reads "
            f"well: give shorter ones by {setting('inherit_bank', ('DIR',))}, kinds to read all the same by "
            f"{setting('inherit_kinds', ('KIND',))}, or {setting('inherit', 'none')}"
        )
    if cut:
        logger.info("%d of %d captions are too long for the tower's text half and not read", cut, len(places))
    return Inheritance(banks, np.concatenate(kept), torch.cat(own))


def _choose(banks: Sequence[Bank], *, kinds: Sequence[str], num_training: int | None, seed: int) -> NDArray[np.int64]:
    """Bank and row [n, 2] of captions, at most `MOST_CAPTIONS`, drawn evenly."""
    training = list(banks[:num_training])
    for kind in kinds:
        check_choice(setting("inherit_kinds"), kind, sorted({name for bank in training for name in bank.kinds}))
    parts = []
    for number, bank in enumerate(banks):
        rows = np.arange(bank.num_rows)
        if kinds and number < len(training):
            codes = [code for code, kind in enumerate(bank.kinds) if kind in kinds]
            rows = np.unique(bank.caption_row[np.isin(bank.caption_kind, codes)])
        parts.append(np.stack([np.full(len(rows), number), rows], axis=1))
    places = np.concatenate(parts).astype(np.int64)
    if len(places) > MOST_CAPTIONS:
        places = places[np.sort(np.random.default_rng(seed).permutation(len(places))[:MOST_CAPTIONS])]
    return places


def fit(adaptor: nn.Module, captions: Inheritance, *, seed: int) -> float:
    """Bring the adaptor's vectors of captions near the half's own; returns the distance that is left."""
    device = next(adaptor.parameters()).device
    number, width = len(captions), captions.banks[0].dim
    steps = max(FEWEST_STEPS, PASSES * number // BATCH_SIZE)
    matrices, others = ([p for p in adaptor.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    rate = min(HIGHEST_RATE, 1 / width)
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    random, left = np.random.default_rng([seed, 1]), torch.tensor(0.0)
    with Progress(steps, description="inherit: adaptor", unit="steps") as progress:
        for step, chosen in enumerate(_draws(number, steps, seed=seed)):
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine_factor(step, steps, WARMUP_STEPS)
            vectors, own = captions.draw(random, chosen, device)
            left = distance(adaptor(vectors), own)
            optimizer.zero_grad()
            left.backward()
            optimizer.step()
            progress.advance(note=f"distance {left.item():.3f}" if step % NOTED_EVERY == 0 else "")
    return left.item()


def _draws(number: int, steps: int, *, seed: int) -> Iterator[NDArray[np.int64]]:
    """`steps` batches of numbers below `number`, all of them in an order of chance, and again."""
    random = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    size = min(BATCH_SIZE, number)
    for _ in range(steps):
        if len(order) < size:
            order = random.permutation(number)
        yield order[:size]
        order = order[size:]
