"""Every setting of stage 1 and MNTP against plain PyTorch: losses, norms and rates by step, weights at the end."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.train import train_teacher

from .oracle import Oracle, Trace
from .watched import Seen

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
    "max_grad_norm": 13.0,  # some steps are above it: AdamW hardly sees one factor for all
    "caption_instruction": "this image shows",
    "eval_images": 2,
    "seed": 3,
}
MNTP: dict[str, Any] = {"mntp": True, "mntp_steps": 3, "mntp_batch_size": 5, "mntp_mask": 0.4}
CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "warm-up": {"steps": 20, "batch_size": 2, "warmup_steps": 1, "random_negative": False},
    "epochs": {"steps": None, "epochs": 2.5},
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
        "steps": 4,
    },
    "source weights": {"text_pairs": ("qa.jsonl",), "source_weights": {"captions": 0.0, "qa": 1.0}},
    "micro-batches": {"micro_batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "mntp": {**MNTP, "mntp_text": ("plain.txt",), "mntp_mask_token": "near"},
    "mntp, full": {**MNTP, "tuning": "full", "learning_rate": 1e-3, "max_length": 12},
    "mntp, warm-up at most a tenth": {**MNTP, "mntp_steps": 20, "warmup_steps": 5},
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "usual": {
        "scale": 50.0,
        "lora_alpha": 4,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "learning_rate": 4.99e-3,
        "caption_instruction": "",
        "mask_duplicates": False,
        "attention": "causal",
        "pooling": "last-token",
    },
    "warm-up": {"warmup_steps": 0},
    "causal": {"attention": "two-way", "pooling": "mean"},
    "weighted": {"pooling": "mean"},
    "cut": {"max_length": 13},
    "chat": {"chat_template": False, "max_length": 59},
    "full": {"weight_decay": 0.0},
    "frozen": {"weight_decay": 0.0},
    "duplicates": {"mask_duplicates": True, "max_grad_norm": 100.0},
    "text pairs": {"instructions": {}},
}
"""Values that the oracle must tell from those of the case: were the run to take these, the test would say so."""
ELSEWHERE = {  # settings with a test of their own below
    "lora_dropout",
    "attention_dropout",
    "precision",
    "seed",
}
NOT_LEARNING = {
    "out": "a place",
    "model_revision": "where the LLM is from",
    "trust_remote_code": "how the LLM is read",
    "captions": "how a source is read: tests/data",
    "image": "how a source is read: tests/data",
    "image_root": "how a source is read: tests/data",
    "allow_outside": "how a source is read: tests/data",
    "max_bad_fraction": "how a source is read: tests/data",
    "split": "which rows of a source are read: tests/data",
    "text_lines": "how a source is read: tests/data",
    "views": "further kinds of caption of a source: tests/data",
    "revision": "where a source is from",
    "quantize": "needs a GPU",
    "save_adapter": "what is written",
    "join": "encoders as they are, beside what is trained: test_join.py",
    "join_revisions": "where those are from: test_join.py",
    "workers": "speed",
    "save_every": "what is written",
    "eval_data": "what is measured",
    "eval_images": "what is measured",
    "eval_every": "what is measured",
}


def test_every_setting_is_held_against_the_oracle_or_said_not_to_learn() -> None:
    bare = TeacherConfig(data=("x",), model="x", out=Path("x"))
    fields = {f.name for f in dataclasses.fields(TeacherConfig)}
    values = [{**USUAL, **case} for case in CASES.values()]
    held = {name for name in fields for case in values if name in case and case[name] != getattr(bare, name)}
    assert fields == held | ELSEWHERE | {"data", "model"} | set(NOT_LEARNING)
    assert held & set(NOT_LEARNING) == {"eval_images"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions, text pairs and plain text; of two images each, one caption differs by case and dot only."""
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
            json.dumps({"query": f"a {a} {b}", "positive": f"the {b} is {a}", "negative": f"the {b} that is drawn"})
            + "\n"
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
    """The trainer collects garbage at its end; with all that was imported that takes as long as the run itself."""
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


def table(sources: Path) -> list[dict[str, str]]:
    """The captions of each image, by their column."""
    with (sources / "captions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def owners_of(sources: Path) -> dict[str, dict[str, int]]:
    """For each task, which image (or row) a text is of; a negative that was given is of none."""
    owners = {"captions": {text: i for i, row in enumerate(table(sources)) for text in row.values()}}
    for task in ("nli", "qa"):
        rows = map(json.loads, (sources / f"{task}.jsonl").read_text().splitlines())
        owners[task] = {row[name]: i for i, row in enumerate(rows) for name in ("query", "positive")}
    return owners


def pairs_of(seen: Seen, sources: Path, config: TeacherConfig) -> list[list[dict[str, Any]]]:
    """The batches of stage 1 as the oracle reads them."""
    owners = owners_of(sources)
    instructions = {"captions": config.caption_instruction, "qa": "this is", "nli": "", **config.instructions}
    batches = [[dict(row) for row in batch] for batch in seen.batches("PairTrainer", config.batch_size)]
    for row in (row for batch in batches for row in batch):
        row.setdefault("negative", None)
        row["instruction"] = instructions[row["dataset_name"]]
        row["images"] = {name: owners[row["dataset_name"]].get(row[name]) for name in ("query", "positive", "negative")}
        assert row["images"]["query"] == row["images"]["positive"] is not None
    return batches


def result_of(out: Path) -> dict[str, Tensor]:
    """The weights of a finished teacher, by the names of the oracle."""
    weights = {f"model.{name}": weight for name, weight in load_file(out / "model.safetensors").items()}
    for i, folder in enumerate(sorted(out.glob("*_Dense"))):
        for name, weight in load_file(folder / "model.safetensors").items():
            weights[f"adaptor{i}.{name.removeprefix('linear.')}"] = weight
    return weights


def traces(seen: Seen, out: Path, kind: str) -> Trace:
    """What was seen of a run, as the oracle says it."""
    pairs = kind == "PairTrainer"
    lines = (out / ("log.jsonl" if pairs else "mntp.jsonl")).read_text().splitlines()
    losses, norms, rates = zip(
        *([json.loads(line)[n] for n in ("loss", "grad_norm", "learning_rate")] for line in lines), strict=True
    )
    assert losses == pytest.approx(seen.losses[kind], abs=1e-4)
    start = {f"model.{name}": w for name, w in seen.start["PairTrainer"].items() if "lora_" not in name}
    return Trace(seen.losses[kind], list(norms), list(rates), result_of(out) if pairs else start)


def check(found: Trace, expected: Trace) -> None:
    """Compare by value; the weights after a few steps, each of about the learning rate, to a five-hundredth of one.

    AdamW enlarges the rounding of a gradient near zero: of a thousand weights one may be off by five times as much (a
    CPU with AMX has one in 2,048 that is).
    """
    assert found.losses == pytest.approx(expected.losses, rel=2e-5, abs=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=2e-4)
    assert found.rates == pytest.approx(expected.rates, rel=1e-9, abs=1e-12)
    assert set(found.weights) <= set(expected.weights)
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert (weight - expected.weights[name]).abs().gt(1e-5).float().mean() <= 1e-3, name


@pytest.mark.parametrize("name", CASES)
def test_a_run_does_what_the_oracle_does(name, config, sources, monkeypatch) -> None:
    settings = config(**CASES[name])
    seen = Seen(monkeypatch)
    out = train_teacher(settings)
    llm = None
    if settings.mntp:
        oracle = Oracle(settings, settings.model, down=seen.down("MaskedTrainer"))
        texts = seen.batches("MaskedTrainer", settings.mntp_batch_size)
        check_hidden(texts, settings, sources, oracle.tokenizer)
        expected = oracle.train(oracle.masked_loss, texts)
        check(traces(seen, out, "MaskedTrainer"), expected)
        llm = expected.weights

    def by_oracle(settings: TeacherConfig) -> Trace:
        oracle = Oracle(settings, settings.model, down=seen.down("PairTrainer"), llm=llm)
        return oracle.train(oracle.pair_loss, pairs_of(seen, sources, settings))

    found = traces(seen, out, "PairTrainer")
    check(found, by_oracle(settings))
    check_drawn(name, pairs_of(seen, sources, settings), sources)
    assert len(found.losses) == (5 if name == "epochs" else settings.steps)
    assert len(seen.losses["MaskedTrainer"]) == settings.mntp * settings.mntp_steps
    assert seen.sizes == ({2, 4} if name == "micro-batches" else {settings.batch_size})
    assert seen.facts["PairTrainer"][0].checkpointing == (name == "checkpointing")
    for field, value in OTHERWISE.get(name, {}).items():
        with pytest.raises(AssertionError):
            check(found, by_oracle(dataclasses.replace(settings, **{field: value})))


def check_drawn(name: str, batches: list[list[dict[str, Any]]], sources: Path) -> None:
    """What pairs with what."""
    tasks = [{row["dataset_name"] for row in batch} for batch in batches]
    rows = [row for batch in batches for row in batch]
    kinds = {text: column for captions in table(sources) for column, text in captions.items()}
    pairs = {frozenset((kinds.get(row["query"]), kinds.get(row["positive"]))) for row in rows}
    if name == "text pairs":
        assert sorted(map(str, tasks)) == ["{'nli'}", "{'nli'}", "{'qa'}", "{'qa'}"]
        assert all("that is drawn" in row["negative"] for row in rows if row["dataset_name"] == "nli")
        assert all(row["images"]["negative"] is not None for row in rows if row["dataset_name"] == "qa")
        return
    assert tasks == [{"qa" if name == "source weights" else "captions"}] * len(batches)
    assert all((row["query"] == row["positive"]) == (name == "same") for row in rows)
    assert all((row["negative"] is None) == (name in ("no random negative", "warm-up")) for row in rows)
    assert all(row["images"]["negative"] != row["images"]["query"] for row in rows)
    if name == "pair weights":
        assert pairs == {frozenset(("short_caption", "long_caption"))}
    if name == "usual":
        assert len(pairs) == 3


def check_hidden(batches: list[list[dict[str, Any]]], config: TeacherConfig, sources: Path, tokenizer: Any) -> None:
    """What MNTP reads and what of it is hidden: other places whenever a text comes again."""
    captions = [text for row in table(sources) for text in row.values()]
    lines = (sources / "plain.txt").read_text().split("\n") if config.mntp_text else []
    known = {
        tuple(tokenizer(text)["input_ids"][: config.max_length]): text for text in [*captions, *filter(None, lines)]
    }
    hidden, read, open_to, places = [], set(), 0, {}
    for row in (row for batch in batches for row in batch):
        pairs = list(zip(row["input_ids"], row["labels"], strict=True))
        whole = tuple(token if label == -100 else label for token, label in pairs)
        read.add(known[whole])
        open_to += sum(token not in tokenizer.all_special_ids for token in whole)
        hidden += [(token, label) for token, label in pairs if label != -100]
        places.setdefault(whole, []).append([i for i, label in enumerate(row["labels"]) if label != -100])
    mask = tokenizer.convert_tokens_to_ids(config.mntp_mask_token or tokenizer.mask_token)
    assert abs(len(hidden) / open_to - config.mntp_mask) < 0.1
    assert abs(sum(token == mask for token, _ in hidden) / len(hidden) - 0.8) < 0.12
    assert bool(read & set(lines)) == bool(config.mntp_text) and read & set(captions)
    again = [found for whole, found in places.items() if len(found) > 1 and len(whole) > 12]
    assert all(found[0] != found[1] for found in again)
    assert again or config.mntp_steps < 20


def test_dropout(config, sources, monkeypatch) -> None:
    """That of the adapters works from the second step on (B starts at 0), that of attention at once, in stage 1."""
    for name, dropouts in {"lora": {"lora_dropout": 0.3}, "attention": {"attention_dropout": 0.4}}.items():
        settings = config(out=sources / name, **MNTP, **dropouts)
        with monkeypatch.context() as patch:
            seen = Seen(patch)
            out = train_teacher(settings)
        for facts in seen.facts["PairTrainer"]:
            assert facts.dropouts == ({0.3} if name == "lora" else set()) and facts.attention == {
                settings.attention_dropout
            }
        for facts in seen.facts["MaskedTrainer"]:
            assert facts.dropouts == ({0.3} if name == "lora" else set()) and facts.attention == {0.0}
        oracle = Oracle(settings, settings.model, down=seen.down("MaskedTrainer"))
        expected = oracle.train(oracle.masked_loss, seen.batches("MaskedTrainer", settings.mntp_batch_size))
        assert seen.losses["MaskedTrainer"][0] == pytest.approx(expected.losses[0], rel=1e-5)
        if name == "lora":
            assert seen.losses["MaskedTrainer"][2] != pytest.approx(expected.losses[2], rel=1e-5)
        start = {f"model.{n}": w for n, w in seen.start["PairTrainer"].items() if "lora_" not in n}
        oracle = Oracle(settings, settings.model, down=seen.down("PairTrainer"), llm=start)
        expected = oracle.train(oracle.pair_loss, pairs_of(seen, sources, settings))
        found = traces(seen, out, "PairTrainer").losses
        assert (found[0] == pytest.approx(expected.losses[0], rel=1e-5)) == (name == "lora")
        assert found[2] != pytest.approx(expected.losses[2], rel=1e-5)


def test_bf16(config, sources, monkeypatch) -> None:
    """Frozen weights are held in it, adapters in fp32; the numbers are those of fp32 up to its rounding."""
    settings = config(precision="bf16", scale=3.0)
    seen = Seen(monkeypatch)
    out = train_teacher(settings)
    assert {facts.autocast for facts in seen.facts["PairTrainer"]} == {"bf16"}
    assert seen.facts["PairTrainer"][0].dtypes == {("llm", torch.bfloat16), ("lora", torch.float32)}
    oracle = Oracle(settings, settings.model, down=seen.down("PairTrainer"))
    expected, found = (
        oracle.train(oracle.pair_loss, pairs_of(seen, sources, settings)),
        traces(seen, out, "PairTrainer"),
    )
    assert found.losses == pytest.approx(expected.losses, rel=3e-2) and found.losses != pytest.approx(expected.losses)
    assert found.norms == pytest.approx(expected.norms, rel=0.1)
    assert {weight.dtype for weight in found.weights.values()} == {torch.bfloat16}


def test_the_seed(config, monkeypatch, tmp_path) -> None:
    """It decides the order, what is drawn, what is hidden, and how adapters start."""
    runs = []
    for i, seed in enumerate((3, 3, 4)):
        with monkeypatch.context() as patch:
            runs.append(Seen(patch))
            train_teacher(config(out=tmp_path / str(i), **MNTP, seed=seed))
    same, again, other = runs
    assert same.rows == again.rows and same.losses == again.losses
    # In the first pass, whatever the order: the pair that an image gives.
    pairs = [{row["label"][3]: (row["query"], row["positive"]) for row in run.rows["PairTrainer"][:12]} for run in runs]
    assert len(pairs[0]) == 12 and pairs[0] != pairs[2] and list(pairs[0]) != list(pairs[2])
    for kind in ("PairTrainer", "MaskedTrainer"):
        assert same.rows[kind] != other.rows[kind]
        down = (run.down(kind)["layers.0.self_attn.q_proj"] for run in (same, other))
        assert not torch.equal(*down)
