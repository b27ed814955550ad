"""`train-teacher` from captions to a folder: it learns, resumes to the bit, and refuses what cannot work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from llm2clip.errors import LLM2CLIPError, SourceError, UsageError
from llm2clip.teacher import train as train_module
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.model import load_teacher, teacher_fingerprint
from llm2clip.teacher.train import train_teacher
from llm2clip.teacher.trainer import PairTrainer, last_checkpoint

SETTINGS: dict[str, Any] = {"steps": 10, "batch_size": 6, "precision": "fp32", "learning_rate": 5e-3, "save_every": 3}


@pytest.fixture
def config(tmp_path, tiny_llm, images_csv):
    def make(name: str = "teacher", **changes: Any) -> TeacherConfig:
        return TeacherConfig(
            **{"data": (str(images_csv),), "model": str(tiny_llm), "out": tmp_path / name, **SETTINGS, **changes}
        )

    return make


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PairTrainer.__init__

    def patched(self, **kwargs):
        original(self, **{**kwargs, "callbacks": [KillAt(step)]})

    monkeypatch.setattr(PairTrainer, "__init__", patched)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.jsonl", "run.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_teacher_learns_to_tell_captions_apart(config, caplog):
    out = train_teacher(config(steps=40))
    assert "learned nothing" not in caplog.text and "a teacher needs" not in caplog.text
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["format"] == "llm2clip/teacher" and manifest["dim"] == 32
    before, after = manifest["before"], manifest["after"]
    assert before["images"] == after["images"] == 24
    assert after["cra_all"] > before["cra_all"] + 0.3
    assert after["alignment"] < before["alignment"] * 2 and after["uniformity"] < before["uniformity"]
    assert manifest["probed_on"] == "a sample of the training captions"
    assert manifest["fingerprint"] == teacher_fingerprint(out) == teacher_fingerprint(load_teacher(out))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40 and lines[-1]["loss"] < lines[0]["loss"]
    assert not (out / "work").exists() and not list(out.rglob("*.bin")) and not list(out.rglob("*.pt"))


@pytest.mark.parametrize("step", [3, 8])
def test_a_killed_run_goes_on_to_the_same_bytes(step, config, monkeypatch, caplog):
    whole = train_teacher(config("whole"))
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        with pytest.raises(Killed):
            train_teacher(config("killed"))
    assert not (config("killed").out / "manifest.json").exists()
    saved = step // SETTINGS["save_every"] * SETTINGS["save_every"]
    assert [path.name for path in config("killed").out.rglob("checkpoint-*")] == [f"checkpoint-{saved}"]
    with caplog.at_level("INFO", logger="llm2clip"), monkeypatch.context() as patch:
        kill_at(saved - 1, patch)  # a step that is not gone through again
        resumed = train_teacher(config("killed"))
    assert f"going on from step {saved}" in caplog.text
    assert files_of(resumed) == files_of(whole)
    steps = [json.loads(line)["step"] for line in (resumed / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) == list(range(1, 11))


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"global'), (12, None)):  # by number: by name, 9 would come last
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "rng_state.pth").write_bytes(b"")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists() and not (tmp_path / "checkpoint-12").exists()
    assert last_checkpoint(tmp_path, num_processes=2) is None
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.ci
def test_equal_runs_write_equal_bytes_whatever_the_speed_settings(config):
    one = train_teacher(config("one"))
    two = train_teacher(config("two", workers=2, save_every=100))
    assert files_of(one) == files_of(two)
    other = train_teacher(config("other", seed=1))
    assert teacher_fingerprint(other) != teacher_fingerprint(one)
    cached = train_teacher(config("cached", micro_batch_size=4, lora_dropout=0))
    plain = train_teacher(config("plain", lora_dropout=0, gradient_checkpointing=True))
    a, b = (load_file(folder / "model.safetensors") for folder in (cached, plain))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-3


def test_a_whole_folder_is_left_alone_and_other_settings_are_refused(config, caplog):
    out = train_teacher(config(steps=2))
    before = files_of(out)
    with caplog.at_level("INFO", logger="llm2clip"):
        train_teacher(config(steps=2, workers=1))
    assert "already complete" in caplog.text and files_of(out) == before
    with pytest.raises(UsageError, match="steps was 2, now 3"):
        train_teacher(config(steps=3))


def test_only_the_adapters_change_and_they_can_be_kept_apart(config, tiny_llm):
    out = train_teacher(config(save_adapter=True, steps=4))
    bare, trained = load_teacher(tiny_llm), load_teacher(out)
    changed = {
        name
        for (name, a), b in zip(bare[0].model.state_dict().items(), trained[0].model.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    }
    linear = {f"{n}.weight" for n, m in bare[0].model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert changed == linear
    from peft import PeftModel

    with_adapter = load_teacher(tiny_llm)
    with_adapter[0].model = PeftModel.from_pretrained(with_adapter[0].model, out / "adapter")
    text = ["a red disc on a dark background"]
    np.testing.assert_allclose(with_adapter.encode(text), trained.encode(text), atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"adaptor_layers": 1, "precision": "bf16"},
        {"attention": "causal", "pooling": "last-token"},
        {"positives": "same", "attention_dropout": 0.3},
    ],
)
def test_an_ablation_is_the_same_when_it_is_loaded_again(changes, config, monkeypatch):
    """What each setting does in training is held in test_oracle.py."""
    saved = []
    save = train_module.save

    def watched(encoder: SentenceTransformer, *args: Any, **options: Any) -> None:
        save(encoder, *args, **options)
        saved.append(encoder.encode(["a red disc", "there is a large square"]))

    monkeypatch.setattr(train_module, "save", watched)
    teacher = load_teacher(train_teacher(config(steps=2, **changes)), dtype="auto")
    np.testing.assert_array_equal(teacher.encode(["a red disc", "there is a large square"]), saved[0])
    assert teacher[0].model.config.is_causal == (changes.get("attention") == "causal")
    assert teacher[0].model.config.attention_dropout == 0
    held = {weight.dtype for weight in teacher.parameters()}
    assert held == {torch.bfloat16 if changes.get("precision") == "bf16" else torch.float32}


def test_an_adaptor_trains_and_loads_without_our_code(config, tiny_llm):
    out = train_teacher(config(steps=4, tuning="frozen", adaptor_layers=2))
    bare, teacher = load_teacher(tiny_llm), SentenceTransformer(str(out), device="cpu")
    frozen = teacher[0].model.state_dict()
    assert all(torch.equal(weight, frozen[name]) for name, weight in bare[0].model.state_dict().items())
    assert len(teacher) == 4 and all(float(layer.linear.weight.abs().max()) > 0 for layer in list(teacher)[2:])
    assert np.abs(teacher.encode(["a red disc"]) - bare.encode(["a red disc"])).max() > 1e-3
    assert teacher_fingerprint(out) == teacher_fingerprint(load_teacher(out))


def test_captions_and_text_tasks_mix(config, tmp_path):
    nli = tmp_path / "nli.jsonl"
    words = "red green blue yellow small large".split()
    rows = [
        {"query": f"a {a} disc", "positive": f"there is a {a} disc", "negative": f"a {b} square"}
        for a in words
        for b in words
        if a != b
    ]
    nli.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = train_teacher(
        config(
            text_pairs=(str(nli),),
            instructions={"nli": "Find an entailed sentence."},
            source_weights={"captions": 3.0, "nli": 1.0},
        )
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"] == {"captions": 24, "nli": 30}
    alone = train_teacher(config("alone", data=(), text_pairs=(str(nli),)))
    manifest = json.loads((alone / "manifest.json").read_text())
    assert manifest["before"] is None and manifest["after"] is None


def test_what_was_bad_is_not_forgotten_by_a_run_that_goes_on(config, tmp_path, monkeypatch):
    csv, nli = tmp_path / "captions.csv", tmp_path / "nli.jsonl"
    rows = [f"{i}.jpg,a red disc {i},{'' if i == 3 else f'there is a disc {i}'}" for i in range(30)]
    csv.write_text("image,short_caption,long_caption\n" + "\n".join(rows) + "\n")
    nli.write_text(
        "".join(json.dumps({"query": f"q {i}", "positive": "" if i == 5 else f"p {i}"}) + "\n" for i in range(30))
    )
    settings = config("mixed", data=(str(csv),), text_pairs=(str(nli),), steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("llm2clip.teacher.data.store_triplets", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train_teacher(settings)
    manifest = json.loads((train_teacher(settings) / "manifest.json").read_text())
    assert manifest["bad_samples"]["counts"] == {"empty caption": 1}
    assert manifest["bad_rows_nli"]["counts"] == {"no text in query or positive": 1}
    assert manifest["rows"] == {"captions": 29, "nli": 29}


def test_scores_on_the_way_are_noted_and_change_nothing(config):
    plain = train_teacher(config("plain"))
    scored = train_teacher(config("scored", eval_every=4))
    assert files_of(plain) == files_of(scored)
    lines = [json.loads(line) for line in (scored / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "cra_all" in line] == [4, 8]


def test_held_out_captions_are_probed_when_given(config, images_csv):
    out = train_teacher(config(steps=2, eval_data=(str(images_csv),), eval_images=10))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["probed_on"] == "held-out captions" and manifest["after"]["images"] == 10


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data": ()}, UsageError, "nothing to train on"),
        ({"steps": 5, "epochs": 1.0}, UsageError, "exclude each other"),
        ({"batch_size": 1}, UsageError, "^batch_size is 1"),
        ({"batch_size": 25}, UsageError, "captions has 24 usable rows"),
        ({"learning_rate": 0.0}, UsageError, "^learning_rate is 0.0"),
        ({"attention": "both-ways"}, UsageError, "did you mean|choose from two-way, causal"),
        ({"lora_dropout": 1.0}, UsageError, "^lora_dropout is 1.0"),
        ({"positives": "same", "lora_dropout": 0.0}, UsageError, "add attention_dropout=0.3"),
        ({"tuning": "frozen"}, UsageError, "^tuning='frozen' .* add adaptor_layers=4"),
        ({"adaptor_layers": -1}, UsageError, "^adaptor_layers is -1"),
        ({"tuning": "full", "quantize": True}, UsageError, "tuning='lora'"),
        ({"tuning": "full", "save_adapter": True}, UsageError, "tuning='lora'"),
        ({"quantize": True, "mntp": True}, UsageError, "exclude each other"),
        ({"precision": "fp16"}, UsageError, "needs a GPU"),
        ({"chat_template": True}, UsageError, "no chat template"),
        ({"pair_weights": {"short": 1.0}}, UsageError, "two kinds"),
        ({"pair_weights": {"short+short": 1.0}}, SourceError, "short"),
        ({"pair_weights": {"short+raw": 1.0}}, SourceError, r"raw\+short; the kinds are long, short"),
        ({"seed": -1}, UsageError, "^seed is -1"),
        ({"eval_images": 1}, UsageError, "^eval_images is 1"),
        ({"eval_data": ("nothing.csv",)}, UsageError, "^eval_data nothing.csv"),
        ({"instructions": {"nli": "x"}}, UsageError, "no such task"),
        ({"source_weights": {"nli": 1.0}}, UsageError, "no such task"),
        ({"caption_instruction": "red " * 600}, UsageError, "of max_length "),
    ],
)
def test_what_cannot_work_ends_in_one_line_and_blocks_nothing(changes, error, words, config, tmp_path):
    with pytest.raises(error, match=words) as caught:
        train_teacher(config(**changes))
    assert "\n" not in str(caught.value)
    if issubclass(error, UsageError | SourceError):
        left = list((tmp_path / "teacher").glob("*")) if (tmp_path / "teacher").exists() else []
        assert [path.name for path in left] in ([], [".lock"])


def test_adapters_trained_on_4_bit_weights_are_merged_into_the_full_ones(config, llm_of):
    pytest.importorskip("bitsandbytes")
    wide = llm_of("llama-64")
    out = train_teacher(config(model=str(wide), quantize=True, precision="bf16", steps=3))
    teacher = load_teacher(out)
    assert not any("bitsandbytes" in type(module).__module__ for module in teacher.modules())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    base, tuned = load_file(wide / "model.safetensors"), load_file(out / "model.safetensors")
    same = [name for name in tuned if torch.equal(tuned[name], base[f"model.{name}"].to(tuned[name].dtype))]
    assert same and all("proj" not in name for name in same)


def test_quantizing_without_bitsandbytes_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install 'llm2clip\\[quantize\\]'"):
        train_teacher(config(quantize=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "tower"}, "is a vision model"),
        ({"source_weights": {"nli": 1.0}}, "no such task"),
        ({"instructions": {"nli": "x"}}, "no such task"),
        ({"text_pairs": ("a/x.jsonl", "b/x.jsonl")}, "two tasks have one name"),
        ({"chat_template": True}, "no chat template"),
        ({"mntp": True, "mntp_mask_token": "two words"}, "not one token"),
    ],
)
def test_settings_and_model_are_looked_at_before_the_data(changes, words, config, tiny_tower):
    """Reading the captions may take hours."""
    if "model" in changes:
        changes = {"model": str(tiny_tower)}
    with pytest.raises(UsageError, match=words):
        train_teacher(config(data=("nosuch.csv",), **changes))


def test_every_process_has_an_equal_part_of_a_batch(config):
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(UsageError, match=r"^batch_size 5 is no multiple of the 2 processes"):
        train_module.check_model(config(batch_size=5), two)
    with pytest.raises(UsageError, match=r"^mntp_batch_size 3 is no multiple of the 2 processes"):
        train_module.check_model(config(mntp=True, mntp_batch_size=3), two)


def test_a_loss_that_is_no_number_stops_the_run(config, monkeypatch):
    monkeypatch.setattr("llm2clip.teacher.loss.pair_loss", lambda v, labels, scale: v[0].sum() * float("nan"))
    with pytest.raises(LLM2CLIPError, match="the loss is nan at step 1"):
        train_teacher(config())


def test_a_gradient_that_is_no_number_stops_the_run(config, monkeypatch):
    monkeypatch.setattr("llm2clip.teacher.loss.pair_loss", lambda v, labels, scale: (0 * v[0].sum()).sqrt())
    with pytest.raises(LLM2CLIPError, match="the gradient norm is nan at step 1; checkpoints of earlier steps"):
        train_teacher(config())


def test_merging_that_moves_vectors_is_refused(config, monkeypatch):
    monkeypatch.setattr(train_module, "merge_lora", lambda encoder: None)
    monkeypatch.setattr(train_module, "_encode", lambda encoder, texts: np.random.randn(len(texts), 4))
    with pytest.raises(LLM2CLIPError, match="merging the adapter moved"):
        train_module.merge_checked(None, [("a", "b")], tolerance=1e-3)  # type: ignore[arg-type]


SCRIPT = """
import sys, json
from pathlib import Path
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.train import train_teacher
settings = json.loads(sys.argv[1])
settings["data"], settings["out"] = tuple(settings["data"]), Path(settings["out"])
train_teacher(TeacherConfig(**settings))
"""


def in_process(config: TeacherConfig, *launcher: str, **changes: Any) -> list[str]:
    settings = {"data": config.data, "model": config.model, "out": str(config.out), **SETTINGS, **changes}
    script = Path(config.out).parent / "run.py"
    script.write_text(SCRIPT)
    return [sys.executable, *launcher, str(script), json.dumps(settings)]


@pytest.mark.slow
def test_kill_9_and_the_same_command_give_the_same_bytes(config):
    changes = {"steps": 200, "save_every": 20}
    whole = train_teacher(config("whole", **changes))
    killed = config("killed", **changes)
    process = subprocess.Popen(in_process(killed, **changes), stderr=subprocess.PIPE)
    checkpoints = killed.out / "work" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed.out / "manifest.json").exists()
    subprocess.run(in_process(killed, **changes), check=True, capture_output=True)
    assert files_of(killed.out) == files_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 4])
def test_two_processes_equal_one_with_the_whole_batch(micro, config):
    """Same batches, negatives from both processes, gradients averaged: the same teacher up to rounding."""
    changes = {"lora_dropout": 0.0, "steps": 6, "micro_batch_size": micro}
    one = train_teacher(config("one", **changes))
    two = config("two", **changes)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(in_process(two, *launcher, **changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two.out))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4
    c = load_file(train_teacher(config("seed", **{**changes, "seed": 5})) / "model.safetensors")
    assert max(float((a[name] - c[name]).abs().max()) for name in a) > 1e-3  # the tolerance tells runs apart


@pytest.mark.parametrize("settings", [{"steps": 3}, {"steps": None, "epochs": 0.5}])
def test_a_teacher_that_cannot_learn_is_told_before_and_after(config, caplog, settings):
    out = train_teacher(config(**settings, batch_size=6, learning_rate=1e-9))
    advice = "give steps=300" if settings["steps"] else "give epochs=80"  # 24 images: 4 steps a pass
    number = settings["steps"] or 2
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told[0] == f"{number} steps of 6; a teacher needs some hundreds: {advice}"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    scores = json.loads((out / "manifest.json").read_text())
    assert told[-1] == (
        f"the teacher has learned nothing: its loss is {lines[-1]['loss']:.4g}, {lines[0]['loss']:.4g} at the start, "
        f"2.485 for who guesses; {scores['after']['cra_all']:.1%} of the captions find another of their image, "
        f"{scores['before']['cra_all']:.1%} before; {advice}"
    ), "ln 12 = 2.485"


def test_a_long_training_that_learned_nothing_is_told_of_rate_and_scale(config):
    """As the runs of docs/teacher.md that collapsed: at ln 24, with a few captions more found than before."""
    losses = [{"loss": 4.0}] * 10 + [{"loss": 3.18}] * 10
    facts: dict[str, Any] = {"rows": {"captions": 3000}, "before": {"cra_all": 0.088, "images": 100}}
    facts["after"] = {"cra_all": 0.105, "images": 100}
    settings = config(steps=480, batch_size=24, random_negative=False)
    assert train_module.nothing_learned(settings, facts, losses) == (
        "the teacher has learned nothing: its loss is 3.18, 4 at the start, 3.178 for who guesses; 10.5% of the "
        "captions find another of their image, 8.8% before; give scale=20 or another learning_rate (now 0.005)"
    )
    learned = {**facts, "after": {"cra_all": 0.37, "images": 100}}
    assert train_module.nothing_learned(settings, learned, losses) == "", "captions are found, whatever the loss"
    assert train_module.nothing_learned(settings, facts, [{"loss": 4.0}] * 10 + [{"loss": 2.0}] * 10) == ""
    assert train_module.nothing_learned(settings, facts, []) == ""
    texts = {**facts, "before": None, "after": None}
    assert "for who guesses; give scale=20" in train_module.nothing_learned(settings, texts, losses)


def test_a_killed_teacher_without_a_checkpoint_gives_its_folder_to_other_settings(config, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        kill_at(2, patch)
        with pytest.raises(Killed):
            train_teacher(config("killed"))
    assert (config("killed").work / "captions.arrow").exists()
    caplog.set_level("INFO", logger="llm2clip")
    other = train_teacher(config("killed", steps=4))
    assert "had come to no result; begun anew" in caplog.text
    assert files_of(other) == files_of(train_teacher(config("whole", steps=4)))
