"""The arms of the comparison, step by step through the ordinary stages; each function is one job of the pipeline.

A   the mini CLIP as it was pretrained
B   the same, fine-tuned with its own text encoder, 32 tokens of each caption;  B-long: 128 tokens
C   the raw LLM as teacher (causal; two-way), its vectors centred, then stage 2
D   LLM2CLIP: the LLM after stage 1 with LoRA as teacher, then stage 2;  D-full: stage 1 on every weight
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from demo.classes import SETS, write_classes
from demo.clip import ClipTraining, Pairs, train_clip
from demo.config import Budget
from demo.write import NUM_TARS, columns, write_csv, write_tars
from llm2clip.artifacts import is_complete, write_json, write_manifest
from llm2clip.data.config import SourceConfig
from llm2clip.data.images import load_image
from llm2clip.data.source import open_source

if TYPE_CHECKING:
    from llm2clip.student.config import StudentConfig

MIX = {"short": 0.7, "long": 0.3}
"""Which captions stage 2, B and B-long see: long ones are learned sooner."""
BEYOND = {f"short-{kind}": f"short_0,{kind}_0" for kind in ("unseen", "es", "zh")}
"""Kinds that stand for caption retrieval between two kinds: one caption of each."""
CLASSES = "classes"
"""Folder of the accuracies in classification, beside that of the other scores."""
MEAN_CAPTIONS = 1000
"""Training captions whose mean vector centres a raw LLM."""
WARMUP_SHARE = 0.375
"""Part of stage 2 in which only the adaptor and the projection learn, as the mini CLIP's tower starts good."""
CONTEXTS = {"B": 32, "B-long": 128}
TEACHERS = {"C-causal": "raw-causal", "C": "raw-two-way", "D": "lora", "D-full": "full"}
"""The arms that have a teacher, and its folder."""


def tars(folder: Path, share: str) -> tuple[str, ...]:
    """The training tars: of all pairs, or of a tenth."""
    numbers = range(NUM_TARS if share == "all" else 1)
    return tuple(str(folder / "data" / "train" / f"{number:05d}.tar") for number in numbers)


def make_data(folder: Path, budget: Budget, seed: int) -> None:
    """Write training tars and what the models are scored on."""
    write_tars(folder / "data" / "train", budget.train, seed=seed)
    make_scored(folder, budget, seed)


def make_scored(folder: Path, budget: Budget, seed: int, *, split: str = "test") -> None:
    """Write the CSV of a split's images, and its scenes of one thing."""
    write_csv(folder / "data" / split, split, budget.test, seed=seed)
    write_classes(folder / "data" / f"{split}-classes", split, per_class=budget.per_class, seed=seed)


def make_teacher(
    folder: Path, llm: Path, budget: Budget, seed: int, *, share: str, tuning: str, texts: Path | None = None
) -> None:
    """Stage 1: the LLM learns to tell the training images' English captions apart.

    With `texts`, a table of captions without images, it reads those too, in twice the steps.
    """
    from llm2clip.teacher.config import TeacherConfig
    from llm2clip.teacher.train import train_teacher

    train_teacher(
        TeacherConfig(
            model=str(llm),
            data=tars(folder, share) + (() if texts is None else (str(texts),)),
            out=folder / "teachers" / f"{tuning}{'' if texts is None else '-texts'}-{share}",
            tuning=tuning,
            lora_rank=32,
            lora_alpha=64,
            lora_dropout=0.0,
            steps=budget.teacher_steps * (1 if texts is None else 2),
            batch_size=min(budget.teacher_batch, budget.train // (1 if share == "all" else NUM_TARS)),
            learning_rate=budget.lora_rate if tuning == "lora" else budget.full_rate,
            caption_instruction="",
            random_negative=False,
            scale=20.0,
            pair_weights={"short+short": 0.45, "long+short": 0.35, "long+long": 0.2},
            max_length=160,
            eval_images=min(64, budget.test // 4),
            save_every=10**6,
            seed=seed,
        )
    )


def make_raw_teacher(folder: Path, llm: Path, *, attention: str) -> None:
    """The raw LLM as a SentenceTransformer whose last layer takes away the mean of training captions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    from llm2clip.teacher.model import llm_as_encoder, save

    encoder = llm_as_encoder(llm, attention=attention, max_length=160, dtype=torch.float32)
    source = open_source(SourceConfig(data=tars(folder, "all")[:3]), images=False)
    texts = [text for sample in source for kind in sample.captions.values() for text in kind][:MEAN_CAPTIONS]
    mean = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False).float().mean(0).cpu()
    width = len(mean)
    centre = Dense(width, width, activation_function=torch.nn.Identity())
    with torch.no_grad():
        centre.linear.weight.copy_(torch.eye(width))
        centre.linear.bias.copy_(-mean)
    whole = SentenceTransformer(modules=[*encoder, centre])
    save(whole, folder / "teachers" / f"raw-{attention}", attention=attention)


def make_tower(clip: Path, out: Path) -> None:
    """The mini CLIP's vision half as a folder of its own, as towers often come."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModel

    whole = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    settings: Any = whole.config.vision_config
    tower = CLIPVisionModel(settings)
    vision = {name: value for name, value in whole.state_dict().items() if name.startswith("vision_model.")}
    wanted = set(tower.state_dict())
    tower.load_state_dict({n if n in wanted else n.removeprefix("vision_model."): v for n, v in vision.items()})
    tower.save_pretrained(out)
    CLIPImageProcessor.from_pretrained(clip).save_pretrained(out)


def make_bank(folder: Path, *, teacher: str, share: str, out: str, dtype: str = "float16") -> None:
    """Encode the training captions with a teacher."""
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    build_bank(
        BankConfig(
            data=tars(folder, share),
            teacher=str(folder / "teachers" / teacher),
            out=folder / "banks" / out,
            dtype=dtype,
        )
    )


def make_student(folder: Path, clip: Path, budget: Budget, seed: int, *, arm: str, bank: str, share: str) -> None:
    """Stage 2: the mini CLIP's tower learns from images and a bank."""
    from llm2clip.student.train import train_student

    out = folder / "models" / f"{arm}-{share}"
    train_student(student_config(folder / "banks" / bank, clip, out, budget, seed=seed, share=share))


def student_config(bank: Path, clip: Path, out: Path, budget: Budget, *, seed: int, share: str) -> StudentConfig:
    """The settings of stage 2 in every arm that has a teacher."""
    from llm2clip.student.config import StudentConfig

    steps = budget.steps if share == "all" else budget.steps_tenth
    return StudentConfig(
        bank=(str(bank),),
        tower=str(clip),
        out=out,
        dim=budget.dim,
        mix=MIX,
        min_crop=1.0,
        steps=steps,
        adaptor_warmup_steps=round(WARMUP_SHARE * steps),
        batch_size=budget.batch_size,
        optimizer="muon",
        learning_rate=budget.student_rate,
        adaptor_learning_rate=budget.adaptor_rate,
        layer_decay=1.0,
        warmup_steps=10,
        precision="fp32",
        workers=0,
        save_every=10**6,
        tracker="none",
        seed=seed,
    )


def make_clip(folder: Path, clip: Path, budget: Budget, seed: int, *, arm: str, share: str) -> None:
    """B and B-long: fine-tune the whole mini CLIP on the same pairs and number of images."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    out = folder / "models" / f"{arm}-{share}"
    if is_complete(out):
        return
    tokenizer = AutoTokenizer.from_pretrained(clip)
    model = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    training = ClipTraining(
        steps=budget.steps if share == "all" else budget.steps_tenth,
        batch_size=budget.batch_size,
        context=CONTEXTS[arm],
        muon_rate=budget.clip_rate,
        adam_rate=budget.clip_rate / 20,
        warmup_steps=10,
        seed=seed,
    )
    pairs = read_pairs(tars(folder, share), tokenizer)
    log = train_clip(model, pairs, training, mix=MIX, description=f"{arm} {share}")
    model.save_pretrained(out)
    tokenizer.model_max_length = CONTEXTS[arm]
    tokenizer.save_pretrained(out)
    CLIPImageProcessor.from_pretrained(clip).save_pretrained(out)
    write_json(out / "log.json", log)
    write_manifest(out, "mini-clip", config={"arm": arm, "share": share, "seed": seed})


def read_pairs(data: tuple[str, ...], tokenizer: Any) -> Pairs:
    """The images and captions of tars, read through the ordinary sources, in memory."""
    import numpy as np

    samples = list(open_source(SourceConfig(data=data)))
    pixels = [torch.from_numpy(np.array(load_image(sample.image))).permute(2, 0, 1) for sample in samples]
    captions = [{kind: tokenizer(list(texts))["input_ids"] for kind, texts in s.captions.items()} for s in samples]
    return Pairs(pixels=torch.stack(pixels), captions=captions)


def score(folder: Path, *, model: str | None, teacher: str | None, name: str, split: str = "test") -> None:
    """Score a model (with its teacher) on the images of a split: retrieval by kind of caption, and classification."""
    from llm2clip.eval.config import EvaluateConfig
    from llm2clip.eval.models import open_encoder
    from llm2clip.eval.named import Named
    from llm2clip.eval.run import read_dataset, run_evaluators

    _evaluate(folder, model=model, teacher=teacher, name=name, captions=columns(), split=split)
    out = folder / CLASSES / f"{name}.json"
    root, benchmark = folder / "data" / f"{split}-classes", "class-folders"
    config = EvaluateConfig(
        benchmark=(benchmark,), root=str(root), out=out, model=model, teacher=teacher, precision="fp32", baseline="none"
    )
    encoder, _ = open_encoder(config)  # once for all sets
    found = {}
    for kind in SETS:
        images = Named(benchmark, root / kind)
        scores = run_evaluators(images, *read_dataset(images, encoder, config))
        found[kind] = next(score.value for score in scores if score.name == "top1")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)


def score_teacher(folder: Path, *, teacher: str, name: str) -> None:
    """Score a teacher alone: caption retrieval among English captions, and from seen English to the rest."""
    english = {**columns(("short", "long")), "short-long": "short_0,long_0"}
    _evaluate(folder, model=None, teacher=teacher, name=f"teacher-{name}", captions=english)
    _evaluate(folder, model=None, teacher=teacher, name=f"teacher-{name}-beyond", captions=BEYOND)


def _evaluate(
    folder: Path, *, model: str | None, teacher: str | None, name: str, captions: dict[str, str], split: str = "test"
) -> None:
    from llm2clip.eval.config import EvaluateConfig
    from llm2clip.eval.run import evaluate

    evaluate(
        EvaluateConfig(
            data=(str(folder / "data" / split / "captions.csv"),),
            captions=captions,
            out=folder / "scores" / name,
            model=model,
            teacher=teacher,
            precision="fp32",
        )
    )
