"""Every setting of stage 1 and MNTP against plain PyTorch, step by step: losses, gradient norms, rates, weights at the end."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.mixture import Mixture
from llm2clip.teacher.mntp import MaskedTexts
from llm2clip.teacher.train import train_teacher

from .oracle import Oracle, Trace

USUAL: dict[str, Any] = {
    "steps": 3,
    "batch_size": 6,
    "precision": "fp32",
    "learning_rate": 5e-3,
    "scale": 13.0,
    "lora_rank": 4,
    "lora_alpha": 10,
    "lora_dropout": 0.0,
    "weight_decay": 4.0,
    "max_grad_norm": 0.6,
    "caption_instruction": "this picture shows",
    "eval_pictures": 2,
    "seed": 3,
}
MNTP: dict[str, Any] = {"mntp": True, "mntp_steps": 3, "mntp_batch_size": 5, "mntp_mask": 0.4}
CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "warm-up": {"steps": 20, "warmup_steps": 1},
    "warm-up, capped": {"steps": 30, "warmup_steps": 5},
    "epochs": {"steps": None, "epochs": 1.5},
    "causal": {"attention": "causal", "pooling": "last-token"},
    "weighted": {"pooling": "weighted"},
    "cut": {"max_length": 12},
    "chat": {"chat_template": True, "model": "chat", "max_length": 60},
    "full": {"tuning": "full", "learning_rate": 2e-3},
    "frozen": {"tuning": "frozen", "adaptor_layers": 2},
    "lora and adaptor": {"adaptor_layers": 1},
    "no instruction": {"caption_instruction": ""},
    "same": {"positives": "same", "lora_dropout": 1e-9},
    "no random negative": {"random_negative": False},
    "duplicates": {"mask_duplicates": False},
    "pair weights": {"pair_weights": {"long+short": 3.0, "raw+short": 0.0}},
    "text pairs": {
        "data": (),
        "text_pairs": ("nli.jsonl", "qa.jsonl"),
        "instructions": {"nli": "near the"},
        "source_weights": {"nli": 3.0, "qa": 1.0},
        "steps": 5,
    },
    "micro-batches": {"micro_batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "mntp": {**MNTP, "mntp_text": ("plain.txt",), "mntp_mask_token": "near"},
    "mntp, full": {**MNTP, "tuning": "full", "learning_rate": 1e-3},
    "mntp, warm-up": {**MNTP, "mntp_steps": 20, "warmup_steps": 2},
}
ELSEWHERE = {  # settings with a test of their own below
    "lora_dropout": "test_dropout",
    "attention_dropout": "test_dropout",
    "precision": "test_bf16",
    "seed": "test_the_seed",
}
NOT_LEARNING = {
    "out": "a place",
    "model_revision": "says where the weights are from",
    "trust_remote_code": "says how the weights are read",
    "captions": "how a source is read: tests/captions",
    "image": "how a source is read: tests/captions",
    "allow_outside": "how a source is read: tests/captions",
    "max_bad_fraction": "how a source is read: tests/captions",
    "revision": "how a source is read: tests/captions",
    "quantize": "needs a GPU",
    "save_adapter": "what is written",
    "workers": "speed",
    "save_every": "what is written",
    "eval_data": "what is measured",
    "eval_pictures": "what is measured",
    "eval_every": "what is measured",
}


def test_every_setting_is_held_against_the_oracle_or_said_not_to_learn() -> None:
    config = TeacherConfig(data=("x",), model="x", out=Path("x"))
    fields = {f.name for f in dataclasses.fields(TeacherConfig)}
    values = [{**USUAL, **case} for case in CASES.values()]
    held = {n for n in fields for case in values if n in case and case[n] != getattr(config, n)} | {"data", "model"}
    assert not held & set(NOT_LEARNING)- {"eval_pictures"}
    assert fields == held | set(ELSEWHERE) | set(NOT_LEARNING)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captions, text pairs and plain text; of two pictures each, one caption differs by case and dot only."""
    folder = tmp_path_factory.mktemp("sources")
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["short_caption", "long_caption", "caption"])
        for i in range(12):
            colour, shape = ("red", "green", "blue")[i // 2 % 3], ("disc", "square")[i // 6]
            long = f"there is a {('small', 'large')[i % 2]} {colour} {shape} on the left of the plain dark background"
            short = f"a {colour} {shape}"
            rows.writerow([f"{short.upper()} ." if i % 2 else short, long, f"{long} near the {colour} corner"])
    (folder / "nli.jsonl").write_text(
        "".join(
            json.dumps({"query": f"a {a} {b}", "positive": f"the {b} is {a}", "negative": f"the {b} that is drawn"}) + "\n"
            for a in ("red", "green", "blue", "yellow")
            for b in ("disc", "square")
        )
    )
    (folder / "qa.jsonl").write_text(
        "".join(
            json.dumps({"query": f"its {a}", "positive": f"{a} its", "instruction": "this is"}) + "\n"
            for a in ("red", "green", "blue", "yellow", "top", "left", "right")
        )
    )
    (folder / "plain.txt").write_text("the small disc is near the left\n\nthere is a large square in the middle\n" * 3)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _young_garbage_only() -> Iterator[None]:
    """The trainer collects garbage at its end, which takes as long as the run itself where all imports are looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def config(tmp_path: Path, sources: Path, llm_of: Any, chat_llm: Path) -> Callable[..., TeacherConfig]:
    def make(**changes: Any) -> TeacherConfig:
        settings = {"data": ("captions.csv",), "model": "llama", "out": tmp_path / "teacher", **USUAL, **changes}
        settings["model"] = str(chat_llm if settings["model"] == "chat" else llm_of(settings["model"]))
        for name in ("data", "text_pairs", "mntp_text"):
            settings[name] = tuple(str(sources / file) for file in settings.get(name, ()))
        return TeacherConfig(**settings)

    return make


class Seen:
    """What a run of the product drew, how its weights started, and what it left, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {"PairTrainer": [], "MaskedTrainer": []}
        self.losses: dict[str, list[float]] = {"PairTrainer": [], "MaskedTrainer": []}
        self.start: dict[str, dict[str, Tensor]] = {}
        self.models: list[Any] = []
        pair, text, step = Mixture.__getitem__, MaskedTexts.__getitem__, Trainer.training_step

        def drawn_pair(mixture: Mixture, key: Any) -> Any:
            self.rows["PairTrainer"].append({**pair(mixture, key), "key": key})
            return pair(mixture, key)

        def drawn_text(texts: MaskedTexts, key: Any) -> Any:
            self.rows["MaskedTrainer"].append({**text(texts, key), "key": key})
            return text(texts, key)

        def stepped(trainer: Any, model: Any, *args: Any, **options: Any) -> Any:
            kind = type(trainer).__name__
            if kind not in self.start:
                self.start[kind] = {_plain_name(n): w.detach().clone() for n, w in model.named_parameters()}
            loss = step(trainer, model, *args, **options)
            self.losses[kind].append(float(loss))
            self.models.append(facts_of(model))
            return loss

        monkeypatch.setattr(Mixture, "__getitem__", drawn_pair)
        monkeypatch.setattr(MaskedTexts, "__getitem__", drawn_text)
        monkeypatch.setattr(Trainer, "training_step", stepped)

    def down(self, kind: str) -> dict[str, Tensor]:
        """How A of each adapter started."""
        found = {n: w for n, w in self.start[kind].items() if n.endswith(".lora_A.default.weight")}
        return {n.removesuffix(".lora_A.default.weight"): w for n, w in found.items()}

    def batches(self, kind: str, size: int) -> list[list[dict[str, Any]]]:
        rows = self.rows[kind]
        return [rows[i : i + size] for i in range(0, len(rows), size)]


def _plain_name(name: str) -> str:
    """The name of a weight inside the LLM, whatever wraps it here."""
    name = name.removeprefix("0.model.").removeprefix("base_model.model.").removeprefix("model.")
    return name.replace(".base_layer.", ".")


def facts_of(model: Any) -> SimpleNamespace:
    """What of a model in training is no number of its result."""
    modules = list(model.modules())
    return SimpleNamespace(
        dropouts={m.p for m in modules if isinstance(m, torch.nn.Dropout) and m.training},
        attention={m.attention_dropout for m in modules if isinstance(getattr(m, "attention_dropout", None), float)},
        training=all(m.training for m in modules),
        checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in modules),
        dtypes={n: w.dtype for n, w in model.named_parameters()},
    )


def owners_of(sources: Path, config: TeacherConfig) -> dict[str, tuple[str, int]]:
    """Which picture (or row of a text task) a text is of; a negative that was given is of none."""
    owners = {}
    with (sources / "captions.csv").open(newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            owners.update({text: ("captions", i) for text in row.values()})
    for file in map(Path, config.text_pairs):
        for i, line in enumerate(file.read_text().splitlines()):
            owners.update({json.loads(line)[name]: (file.stem, i) for name in ("query", "positive")})
    return owners


def instruction_of(config: TeacherConfig, task: str) -> str:
    given = {"captions": config.caption_instruction, "qa": "this is", **config.instructions}
    return given.get(task, "")


def pairs_of(seen: Seen, sources: Path, config: TeacherConfig) -> list[list[dict[str, Any]]]:
    owners = owners_of(sources, config)
    batches = seen.batches("PairTrainer", config.batch_size)
    for row in (row for batch in batches for row in batch):
        row.setdefault("negative", None)
        row["instruction"] = instruction_of(config, row["dataset_name"])
        row["pictures"] = {name: owners.get(row[name]) for name in ("query", "positive", "negative")}
        assert row["pictures"]["query"] == row["pictures"]["positive"] is not None
    return batches


def log_of(file: Path) -> Trace:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return Trace(*([line[name] for line in lines] for name in ("loss", "grad_norm", "learning_rate")))


def check(found: Trace, expected: Trace) -> None:
    assert len(found.losses) == len(expected.losses)
    assert found.losses == pytest.approx(expected.losses, rel=2e-5, abs=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=2e-4)
    assert found.rates == pytest.approx(expected.rates, rel=1e-9, abs=1e-12)
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=0, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def result_of(out: Path) -> dict[str, Tensor]:
    """The weights of a finished teacher, by the names of the oracle."""
    weights = {f"model.{name}": w for name, w in load_file(out / "model.safetensors").items()}
    for i, folder in enumerate(sorted(out.glob("*_Dense"))):
        weights.update({f"adaptor{i}.{n.removeprefix('linear.')}": w for n, w in load_file(folder / "model.safetensors").items()})
    return weights


@pytest.mark.parametrize("name", CASES)
def test_a_run_does_what_the_oracle_does(name, config, sources, monkeypatch) -> None:
    settings = config(**CASES[name])
    seen = Seen(monkeypatch)
    out = train_teacher(settings)
    llm = None
    if settings.mntp:
        oracle = Oracle(settings, settings.model, down=seen.down("MaskedTrainer"))
        expected = oracle.train(oracle.masked_loss, seen.batches("MaskedTrainer", settings.mntp_batch_size))
        log = log_of(out / "mntp.jsonl")
        start = {f"model.{n}": w for n, w in seen.start["PairTrainer"].items() if "lora_" not in n}
        check(Trace(seen.losses["MaskedTrainer"], log.norms, log.rates, start), expected)
        llm = expected.weights
    oracle = Oracle(settings, settings.model, down=seen.down("PairTrainer"), llm=llm)
    expected = oracle.train(oracle.pair_loss, pairs_of(seen, sources, settings))
    log = log_of(out / "log.jsonl")
    check(Trace(seen.losses["PairTrainer"], log.norms, log.rates, result_of(out)), expected)
    assert log.losses == pytest.approx(expected.losses, abs=1e-4)
    assert all(model.training for model in seen.models)
