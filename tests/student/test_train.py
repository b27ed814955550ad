"""The whole stage on 24 images: it learns, and a killed run ends in the same bytes (`test_oracle.py`: in which)."""

import dataclasses
import functools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch.nn.functional import cross_entropy

from llm2clip.artifacts import read_manifest
from llm2clip.errors import TooManyBadSamples, UsageError
from llm2clip.student import accelerator, checkpoint, session, train
from llm2clip.student.accelerator import check_sharding, keep_sums_whole, start_accelerator
from llm2clip.student.config import StudentConfig
from llm2clip.student.model import Student
from llm2clip.student.train import accuracy, train_student

from .banks import small_run
from .forks import counting, die_within, in_child


@pytest.fixture(scope="module")
def bank(tiny_llm, images_csv, tmp_path_factory) -> Path:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    out = tmp_path_factory.mktemp("banks") / "bank"
    return build_bank(BankConfig(data=(str(images_csv),), teacher=str(tiny_llm), out=out))


@pytest.fixture
def config(bank, tiny_tower, tmp_path):
    """A function from settings to a config of a run of a second."""

    def make(**settings) -> StudentConfig:
        return StudentConfig(**{**small_run(bank, tiny_tower), "out": tmp_path / "student", **settings})

    return make


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_speed(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def artifact(folder: Path) -> dict[str, bytes]:
    """The bytes of what a run leaves for others; its log has speeds in it."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json", "manifest.json")}


def test_it_learns_and_leaves_a_whole_folder(config, caplog) -> None:
    out = train_student(config(steps=60, batch_size=12))
    assert "learned nothing" not in caplog.text and "a student needs" not in caplog.text
    losses = [line["loss"] for line in log(out)]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.6 * sum(losses[:5])
    manifest = read_manifest(out, "student")
    assert manifest["steps"] == 60 and manifest["bad_images"]["num_bad"] == 0
    assert manifest["teacher_dim"] == 32 and manifest["projection_dim"] == 16
    assert manifest["kinds"] == ["long", "short"]
    assert not (out / "checkpoints").exists() and not (out / ".lock").exists()
    student = Student.from_pretrained(out)
    assert sum(p.numel() for p in student.parameters()) == manifest["num_parameters"]
    from transformers import AutoImageProcessor

    assert AutoImageProcessor.from_pretrained(out).crop_size["height"] == 32


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_one_that_cannot_learn_is_told_before_and_after(config, caplog, loss) -> None:
    settings = {"steps": None, "epochs": 1, "batch_size": 12, "learning_rate": 1e-9, "adaptor_learning_rate": 1e-9}
    out = train_student(config(**settings, loss=loss))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told[0] == "2 steps of 12; a student needs some hundreds: give epochs=200"  # 150 passes of 2
    first, last = log(out)
    guess = ", 2.485 for who guesses" if loss == "softmax" else ""  # ln 12
    assert told[-1] == (
        f"the student has learned nothing: its loss is {last['loss']:.4g}, {first['loss']:.4g} at the start{guess}; "
        f"{last['accuracy']:.1%} of a batch's images find their caption, 8.3% of who guesses; give epochs=200"
    )


def test_a_long_run_that_learned_nothing_is_told_of_rates(config) -> None:
    run = SimpleNamespace(
        config=config(batch_size=128, steps=400),
        total_steps=400,
        loader=SimpleNamespace(num_samples=3000, size=64),
        accelerator=SimpleNamespace(num_processes=2),
    )
    losses = [{"loss": 5.6, "accuracy": 0.01}] * 10 + [{"loss": 4.84, "accuracy": 0.016}] * 10
    assert train.nothing_learned(run, losses) == (
        "the student has learned nothing: its loss is 4.84, 5.6 at the start, 4.852 for who guesses; 1.6% of a batch's "
        "images find their caption, 1.6% of who guesses; see that captions belong to their images, and give another "
        "learning_rate or adaptor_learning_rate=0.001"
    )
    assert train.nothing_learned(run, losses[:10] + [{"loss": 4.84, "accuracy": 0.05}] * 10) == "", "found above chance"
    locked = SimpleNamespace(**{**vars(run), "config": config(batch_size=128, steps=400, unlocked_blocks=0)})
    assert train.nothing_learned(locked, losses).endswith("and give another adaptor_learning_rate=0.001")
    assert train.nothing_learned(run, losses[:10] + [{"loss": 4.0, "accuracy": 0.016}] * 10) == "", "the loss fell"
    assert train.nothing_learned(run, []) == ""


def test_a_complete_run_is_left_alone(config) -> None:
    out = train_student(config(steps=2))
    before = artifact(out)
    train_student(config(steps=2))
    assert artifact(out) == before
    with pytest.raises(UsageError, match="other settings"):
        train_student(config(steps=3))


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 3, "captions_per_image": 2},
        {"accumulate": 2},
        {"loss": "sigmoid"},
        {"label_smoothing": 0.1},
        {"optimizer": "muon", "ema": 0.9},
        {"lora_rank": 2},
        {"unlocked_blocks": 1, "patch_dropout": 0.5},
        {"unlocked_blocks": 0},
        {"gradient_checkpointing": True, "image_size": 48},
        {"adaptor_warmup_steps": 3, "warmup_steps": 2},
        {"init": "random", "precision": "bf16", "min_crop": 0.5},
        {"mix": {"long": 1.0}, "adaptor_learning_rate": 1e-2},
        {"workers": 2},
    ],
    ids=str,
)
def test_every_option_survives_a_kill(config, settings, tmp_path, monkeypatch) -> None:
    """Each option twice: in one go, and broken off after step 4 with a checkpoint at 2."""
    unbroken = train_student(config(**settings, out=tmp_path / "whole"))
    real = train.train_step

    def dies(run, batches):
        if run.step == 4:
            raise KeyboardInterrupt
        return real(run, batches)

    broken = config(**settings, save_every=2)
    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_student(broken)
    monkeypatch.setattr(train, "train_step", real)
    out = train_student(broken)
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4, 5, 6]
    assert without_speed(log(out)) == without_speed(log(unbroken))
    whole = artifact(unbroken)
    for name, content in artifact(out).items():
        assert content == whole[name], name


def test_the_loss_scaler_of_fp16_skips_steps_and_goes_on_after_a_kill(config, monkeypatch, tmp_path) -> None:
    """On the CPU accelerate has none, so it is put in; so large a scale overflows in the first steps."""
    start, step, scalers, norms = train.start_accelerator, train.train_step, [], []

    def scaling(config):
        accelerator = start(config)
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
        scalers.append(accelerator.scaler)
        return accelerator

    def watched(run, batches):
        values = step(run, batches)
        norms.append(values["grad_norm"].item())
        if run.step == 9 and run.out.name == "broken":
            raise KeyboardInterrupt
        return values

    monkeypatch.setattr(train, "start_accelerator", scaling)
    monkeypatch.setattr(train, "train_step", watched)
    settings = {"steps": 14, "save_every": 7, "micro_batch_size": 3, "precision": "fp16"}
    whole = artifact(train_student(config(**settings, out=tmp_path / "whole")))
    assert {math.isfinite(norm) for norm in norms} == {False, True}
    broken = config(**settings, out=tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        train_student(broken)
    (tmp_path / "broken").rename(tmp_path / "again")
    assert artifact(train_student(config(**settings, out=tmp_path / "again"))) == whole
    assert scalers[0].state_dict() == scalers[2].state_dict() != torch.amp.GradScaler("cpu").state_dict()


def test_what_only_changes_speed_changes_nothing_else(config, tmp_path) -> None:
    plain = train_student(config(steps=3))
    other = train_student(config(steps=3, workers=2, save_every=1, tracker="none", out=tmp_path / "other"))
    assert artifact(other) == artifact(plain)
    assert without_speed(log(other)) == without_speed(log(plain))


@pytest.mark.parametrize("flag", [False, True])
def test_a_pretrained_tower_is_in_training_mode_and_recomputes_where_asked(config, flag) -> None:
    """transformers loads models in evaluation mode, in which nothing is dropped and nothing recomputed."""
    settings = config(gradient_checkpointing=flag)
    run = session.Session(settings, start_accelerator(settings))
    assert all(module.training for module in run.student.modules())
    calls = []
    run.student.tower.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    train.train_step(run, next(run.batches()))
    assert len(calls) == (2 if flag else 1)


def test_a_whole_clip_is_loaded_without_a_list_of_its_text_weights(towers, caplog, capfd) -> None:
    import transformers

    from llm2clip.student.start import start_student

    before = transformers.logging.get_verbosity()
    start_student(str(towers["clip"]), teacher_dim=8)
    assert "UNEXPECTED" not in capfd.readouterr().err + caplog.text
    assert transformers.logging.get_verbosity() == before


def test_a_tracker_that_is_not_installed_is_what_the_line_is_about(config, monkeypatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^tracker wandb needs its package"):
        start_accelerator(config(tracker="wandb"))


def test_patch_dropout_is_refused_in_one_line(config, towers) -> None:
    with pytest.raises(UsageError, match=r"^patch_dropout does not work for dinov3"):
        train_student(config(tower=str(towers["dinov3"]), patch_dropout=0.5))


def test_steps_let_go_of_their_batches(config) -> None:
    settings = config(accumulate=2)
    run = session.Session(settings, start_accelerator(settings))
    batches = run.batches()
    first = next(batches)
    assert len(first) == 2
    next(batches)
    assert first == []


def test_fsdp2_adds_gradients_up_in_fp32_and_others_are_refused(config, monkeypatch) -> None:
    import accelerate
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half = MixedPrecisionPolicy(*[torch.bfloat16] * 3)  # what accelerate makes of bf16
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=half)
    keep_sums_whole(plugin)
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16 and policy.reduce_dtype == policy.output_dtype == torch.float32
    check_sharding(config(), plugin)
    plugin.activation_checkpointing = True
    with pytest.raises(UsageError, match="give gradient_checkpointing=True"):
        check_sharding(config(), plugin)
    plugin.activation_checkpointing = False
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    check_sharding(config(adaptor_warmup_steps=1), plugin)
    with pytest.raises(UsageError, match=r"^adaptor_warmup_steps under FSDP2 in bf16 needs torch 2\.14"):
        check_sharding(config(adaptor_warmup_steps=1, precision="bf16"), plugin)
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        monkeypatch.setattr(accelerate.Accelerator, "distributed_type", kind)
        monkeypatch.setattr(accelerate.Accelerator, "is_fsdp2", False)
        with pytest.raises(UsageError, match=rf"{kind.value}; a student trains under DDP or FSDP version 2"):
            start_accelerator(config())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_bank_of_every_dtype_trains(config, tiny_llm, images_csv, tmp_path, dtype) -> None:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    settings = {"data": (str(images_csv),), "teacher": str(tiny_llm), "precision": "fp32"}
    stored = build_bank(BankConfig(out=tmp_path / dtype, dtype=dtype, **settings))
    losses = [
        [line["loss"] for line in log(train_student(config(bank=(str(folder),), steps=3, out=tmp_path / f"{i}")))]
        for i, folder in enumerate((config().bank[0], stored))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_checkpoints_are_a_tenth_of_the_run_apart_unless_told(config, monkeypatch) -> None:
    saved = []
    monkeypatch.setattr(session.Session, "save", lambda run: saved.append(run.step))
    train_student(config(steps=25))
    train_student(config(steps=25, save_every=9, out=config().out.with_name("other")))
    assert saved == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 9, 18]


@pytest.mark.ci
def test_kill_9_and_the_same_command_again(config, tmp_path) -> None:
    settings = {"steps": 12, "save_every": 3}
    whole = artifact(train_student(config(**settings, out=tmp_path / "whole")))
    out = tmp_path / "killed"
    run = config(**settings, out=out)
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in run.settings().items()}
    (tmp_path / "run.json").write_text(json.dumps({**fields, "out": str(out), "workers": 0, "save_every": 3}))
    code = f"""
import os, signal
from llm2clip.config import from_file
from llm2clip.student import train
from llm2clip.student.config import StudentConfig
from llm2clip.student.data import Batch
real = train.train_step
def dies(run, batches):
    if run.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, batches)
train.train_step = dies
train.train_student(from_file(StudentConfig, {str(tmp_path / "run.json")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert artifact(train_student(run)) == whole


PLACES = {
    "begin": (session.Session, "__init__"),
    "step": (train, "train_step"),
    "save": (session, "save_checkpoint"),
    "write": (checkpoint._Writer, "write_data"),
    "finish": (train, "finish"),
}
KILLS = (  # where, and at which entry; the moment within it is drawn
    ("begin", 1),
    ("step", 1),
    ("step", 2),
    ("save", 1),
    ("save", 3),
    ("step", 4),
    ("begin", 1),
    ("write", 2),
    ("save", 4),
    ("finish", 1),
)


@pytest.mark.slow
@pytest.mark.own_process
def test_kill_9_at_ten_random_moments(config, tmp_path, monkeypatch) -> None:
    """Before the first checkpoint, while one is opened or written, after it, and in the finished folder."""
    settings = {"steps": 24, "save_every": 2, "ema": 0.9}
    calls: dict[str, list[int]] = {place: [] for place in PLACES}
    with monkeypatch.context() as patch:
        for place, (owner, name) in PLACES.items():
            patch.setattr(owner, name, counting(getattr(owner, name), calls[place]))
        whole = artifact(train_student(config(**settings, out=tmp_path / "whole")))
    run, moments, found = config(**settings, out=tmp_path / "killed"), random.Random(0), []
    for place, entry in KILLS:
        call = moments.randint(1, int(0.9 * min(calls[place])))  # a run that goes on makes a few calls less or more
        status, error = in_child(functools.partial(train_and_die, run, place, entry, call))
        assert status == -signal.SIGKILL, f"the child to be killed in {place} ended by itself: {status} {error}"
        written = sorted(path.name[:5] for path in (run.out / "checkpoints").glob("*"))
        found.append((place, ".writ" in written, "step-" in written))
    assert found[:3] == [("begin", False, False), ("step", False, False), ("step", False, False)], "no checkpoint yet"
    assert ("write", True, True) in found, "none while a checkpoint was half written beside a whole one"
    assert any(place == "step" and saved for place, _, saved in found), "none after a checkpoint"
    assert not (run.out / "manifest.json").exists()
    assert in_child(functools.partial(train_student, run)) == (0, "")
    assert artifact(run.out) == whole


def train_and_die(run: StudentConfig, place: str, entry: int, call: int) -> None:
    die_within(*PLACES[place], entry=entry, calls=call)
    train_student(run)


def test_bad_images_are_replaced_counted_and_named(config, tiny_llm, images_csv, tmp_path) -> None:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    folder = tmp_path / "images"
    shutil.copytree(images_csv.parent, folder)
    bank = build_bank(BankConfig(data=(str(folder / "captions.csv"),), teacher=str(tiny_llm), out=tmp_path / "bank"))
    (folder / "003.jpg").write_bytes(b"")
    (folder / "007.jpg").write_bytes((folder / "007.jpg").read_bytes()[:200])
    manifest = read_manifest(train_student(config(bank=(str(bank),), max_bad_fraction=0.5)), "student")
    bad = manifest["bad_images"]
    assert bad["num_bad"] == sum(bad["counts"].values()) > 0 and len(bad["counts"]) == 2
    assert any("003.jpg" in example for examples in bad["examples"].values() for example in examples)
    with pytest.raises(TooManyBadSamples, match=r"above max_bad_fraction 0\.01"):
        train_student(config(bank=(str(bank),), max_bad_fraction=0.01, out=tmp_path / "strict"))


def test_two_banks_and_a_batch_that_is_too_large(config, bank, tiny_tower, tmp_path) -> None:
    out = train_student(config(bank=(str(bank), str(bank)), bank_weights=(1.0, 3.0)))
    assert read_manifest(out, "student")["num_samples"] == 48
    with pytest.raises(UsageError, match=r"^batch_size 25 is above"):
        train_student(config(batch_size=25, out=tmp_path / "large"))
    with pytest.raises(UsageError, match="kind"):
        train_student(config(mix={"shrt": 1.0}, out=tmp_path / "typo"))


def test_the_loss_of_a_batch_leaves_equal_captions_out(config) -> None:
    run = session.Session(config(batch_size=4), start_accelerator(config()))
    (batch,) = next(run.batches())
    target = torch.arange(4)
    for rows, left_out in (([5, 6, 5, 7], [(0, 2), (2, 0)]), ([4, 6, 5, 7], [])):
        batch.rows = torch.tensor(rows)
        with torch.no_grad():
            image, text, scale = run.model(batch.pixels, batch.text_embeds)
            scores = scale * image @ text.T
        for place in left_out:
            scores[place] = -math.inf
        wanted = (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2
        torch.testing.assert_close(train.train_step(run, [batch])["loss"], wanted)


def test_accuracy_by_hand() -> None:
    image = torch.eye(4)
    assert accuracy(image, image) == 1
    assert accuracy(image, image[[0, 1, 3, 2]]) == 0.5
    assert accuracy(image, image.repeat_interleave(2, 0), tile=3) == 1, "two captions an image"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bank": ("bnak",)}, "bnak is no folder"),
        ({"val_bank": "bnak"}, "bnak is no folder"),
        ({"tower": "./towre"}, "tower ./towre is no folder"),
        ({"batch_size": 25}, "^batch_size 25 is above"),
        ({"unlocked_blocks": 3}, "^unlocked_blocks is 3"),
    ],
    ids=str,
)
def test_a_mistyped_command_leaves_nothing_in_the_way_of_the_right_one(config, settings, words) -> None:
    with pytest.raises(UsageError, match=words):
        train_student(config(**settings))
    assert not config().out.exists()
    train_student(config(steps=1))


class FakeTracker(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory, tracker = "fake", False, None

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.steps = [], []

    def store_init_configuration(self, values) -> None:
        self.settings.append(values)

    def log(self, values, step=None, **options) -> None:
        self.steps.append(step)


def test_trackers_are_told_the_settings_also_when_a_run_goes_on(config, monkeypatch) -> None:
    fake = FakeTracker()
    monkeypatch.setattr(accelerator, "find_tracker", lambda name: [fake])
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, batches: real(run, batches) if run.step < 4 else 1 / 0)
    run = config(mix={"long": 1.0}, save_every=2, val_every=7)
    with pytest.raises(ZeroDivisionError):
        train_student(run)
    monkeypatch.setattr(train, "train_step", real)
    train_student(run)
    first, second = fake.settings
    assert first == second and list(first) == [field.name for field in dataclasses.fields(run)]
    assert all(value is None or type(value) in (bool, int, float, str) for value in first.values())
    assert first["val_every"] == 7 and first["learning_rate"] == 1e-3 and first["compile"] is False
    assert first["mix"] == '{"long": 1.0}' and json.loads(first["bank"]) == list(run.bank)
    assert fake.steps[-2:] == [5, 6]


def test_tensorboard_gets_curves_and_settings_also_when_a_run_goes_on(config, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, batches: real(run, batches) if run.step < 4 else 1 / 0)
    run = config(tracker="tensorboard", save_every=2, mix={"long": 1.0})
    with pytest.raises(ZeroDivisionError):
        train_student(run)
    monkeypatch.setattr(train, "train_step", real)
    curves = EventAccumulator(str(train_student(run) / "curves" / "llm2clip")).Reload()
    assert {event.step for event in curves.Scalars("loss")} == {1, 2, 3, 4, 5, 6}
    folders = [path.parent for path in (run.out / "curves" / "llm2clip").glob("*/events.out*")]
    assert len(folders) == 2, "one a start"
    for folder in folders:
        told = EventAccumulator(str(folder)).Reload().SummaryMetadata("_hparams_/session_start_info")
        assert b'{"long": 1.0}' in told.plugin_data.content and b"adaptor_learning_rate" in told.plugin_data.content
