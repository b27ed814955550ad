"""What a run has beside its weights: randomness, scores, counts; and all of it again in a run that goes on."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip import journal
from llm2clip.artifacts import read_json, read_manifest, write_json
from llm2clip.errors import LLM2CLIPError, UsageError
from llm2clip.student import session, train
from llm2clip.student.accelerator import start_accelerator
from llm2clip.student.checkpoint import tensors_fingerprint
from llm2clip.student.config import StudentConfig
from llm2clip.student.model import Student
from llm2clip.student.session import Session
from llm2clip.student.train import train_student

from .banks import image_samples, log, small_run, write_test_bank

Make = Callable[..., StudentConfig]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banks")
    return write_test_bank(folder / "bank", image_samples(folder / "images", 24)).folder


@pytest.fixture
def config(bank: Path, tiny_tower: Path, tmp_path: Path) -> Make:
    """A function from settings to those of a short run."""

    def make(**settings: Any) -> StudentConfig:
        settings = {"out": tmp_path / "student", "adaptor_blocks": 1, **settings}
        return StudentConfig(**small_run(bank, tiny_tower) | settings)

    return make


def dies_at(step: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have runs broken off when `step` steps are done, until it is undone."""
    real = train.train_step

    def dying(run: Session, batches: list[Any]) -> Any:
        if run.step == step:
            raise KeyboardInterrupt
        return real(run, batches)

    monkeypatch.setattr(train, "train_step", dying)
    return monkeypatch


def goes_on(run: StudentConfig, *, died_at: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was broken off when `died_at` steps were done, and called again."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(died_at, patch)
        train_student(run)
    return train_student(run)


def told(folder: Path) -> list[dict[str, Any]]:
    """The log but for speeds."""
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in log(folder)]


def scored_by_step(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> list[dict[str, Any]]:
    """Have --val-bank give `scores`; what it was shown: the student's weights, those that learn, and their average."""
    shown: list[dict[str, Any]] = []
    real = Session.score

    def score(run: Session) -> bool:
        learning = {name: p.detach().clone() for name, p in run.student.named_parameters()}
        average = run.average and {name: value.clone() for name, value in run.average.values.items()}

        def fake(student: Student, *args: Any, **options: Any) -> dict[str, float]:
            weights = {name: p.detach().clone() for name, p in student.named_parameters()}
            shown.append({"step": run.step, "scored": weights, "learning": learning, "average": average})
            return {"val/r@1": scores[run.step]}

        with monkeypatch.context() as patch:
            patch.setattr(session, "validate", fake)
            stop = real(run)
        after = dict(run.student.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in learning.items()), "learning goes on from these"
        return stop

    monkeypatch.setattr(Session, "score", score)
    return shown


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_weights_with_the_best_score_are_kept_and_end_the_run(config, bank, monkeypatch, ema) -> None:
    """With an average, it is what is scored and kept. An equal score is no better one."""
    shown = scored_by_step(monkeypatch, {2: 0.1, 4: 0.5, 6: 0.5, 8: 0.4, 10: 0.9})
    out = train_student(config(steps=20, val_bank=str(bank), patience=2, ema=ema))
    manifest = read_manifest(out, "student")
    assert manifest["steps"] == 8 and manifest["best_score"] == 0.5
    assert [(line["step"], line["val/r@1"]) for line in log(out) if "val/r@1" in line] == [
        (2, 0.1),
        (4, 0.5),
        (6, 0.5),
        (8, 0.4),
    ]
    for each in shown:
        wanted = each["average"] if ema else each["learning"]
        assert all(torch.equal(value, wanted[name]) for name, value in each["scored"].items())
        assert not ema or not torch.equal(wanted["logit_scale"], each["learning"]["logit_scale"])
    kept = dict(Student.from_pretrained(out).named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in shown[1]["scored"].items())


def test_the_last_step_is_scored_too(config, bank) -> None:
    out = train_student(config(steps=5, val_bank=str(bank), val_every=2))
    scores = {line["step"]: line["val/r@1"] for line in log(out) if "val/r@1" in line}
    assert list(scores) == [2, 4, 5]
    assert read_manifest(out, "student")["best_score"] == pytest.approx(max(scores.values()), rel=1e-6)


def test_a_run_that_goes_on_knows_its_best_score_and_how_long_it_waits(config, bank, tmp_path, monkeypatch) -> None:
    """Broken off between the first and the second score without a better one: it stops where the unbroken run does."""
    shown = scored_by_step(monkeypatch, {2: 0.5, 4: 0.4, 6: 0.3, 8: 0.9, 10: 0.1, 12: 0.1})
    settings = {"steps": 12, "val_bank": str(bank), "val_every": 2, "patience": 2, "save_every": 5}
    whole = train_student(config(**settings, out=tmp_path / "whole"))
    assert [each["step"] for each in shown] == [2, 4, 6]
    again = goes_on(config(**settings), died_at=5, monkeypatch=monkeypatch)
    assert [each["step"] for each in shown] == [2, 4, 6, 2, 4, 6]
    assert read_manifest(again, "student") == read_manifest(whole, "student")
    assert told(again) == told(whole)


def test_bad_images_are_counted_on_in_a_run_that_goes_on(config, tmp_path, monkeypatch) -> None:
    samples = image_samples(tmp_path / "images", 24)
    for i in (3, 7, 11, 15):
        Path(samples[i].image.path).write_bytes(b"")
    folder = str(write_test_bank(tmp_path / "bank", samples).folder)
    settings = {"bank": (folder,), "max_bad_fraction": 0.5, "save_every": 2}
    whole = read_manifest(train_student(config(**settings, out=tmp_path / "whole")), "student")
    again = read_manifest(goes_on(config(**settings), died_at=5, monkeypatch=monkeypatch), "student")
    assert again == whole and whole["bad_images"]["num_bad"] > 4


@pytest.mark.parametrize("changed", ["bank", "tower"])
def test_other_contents_in_the_same_place_are_noticed(config, tiny_tower, tmp_path, monkeypatch, changed) -> None:
    samples = image_samples(tmp_path / "images", 24)
    bank, tower = tmp_path / "bank", tmp_path / "tower"
    write_test_bank(bank, samples)
    tower.mkdir()
    for path in tiny_tower.iterdir():
        (tower / path.name).write_bytes(path.read_bytes())
    run = config(bank=(str(bank),), tower=str(tower), save_every=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(4, patch)
        train_student(run)
    if changed == "bank":
        bank.rename(tmp_path / "old")
        write_test_bank(bank, image_samples(tmp_path / "others", 24, name="q"))
    else:
        weights = load_file(tower / "model.safetensors")
        save_file({k: v + 1 for k, v in weights.items()}, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="other contents"):
        train_student(run)


def test_a_val_bank_of_another_teacher_is_refused(config, tmp_path) -> None:
    other = write_test_bank(tmp_path / "other", image_samples(tmp_path / "images", 4), teacher="u" * 16)
    with pytest.raises(UsageError, match="of teacher u"):
        train_student(config(val_bank=str(other.folder)))


def test_a_step_s_randomness_is_of_its_seed_number_and_process(config, monkeypatch) -> None:
    def seed_of(step: int = 0, process: int = 0, **settings: Any) -> int:
        run = Session(config(**settings), start_accelerator(config()))
        batches = next(run.batches())
        run.step = step
        with monkeypatch.context() as patch:
            patch.setattr(accelerate.Accelerator, "process_index", process)
            train.train_step(run, batches)
        return torch.initial_seed()

    usual = seed_of()
    torch.rand(3)
    assert seed_of() == usual
    assert len({usual, seed_of(step=1), seed_of(process=1), seed_of(seed=1)}) == 4


def test_images_per_second_count_all_accumulated_batches(config, monkeypatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(journal, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    out = train_student(config(steps=3, accumulate=2))
    assert [line["images_per_second"] for line in log(out)] == [2 * 8] * 3, "a step a second"


def test_no_checkpoint_has_weights_after_a_loss_that_is_no_number(config, monkeypatch) -> None:
    real = train.train_step

    def breaks(run: Session, batches: list[Any]) -> Any:
        values = real(run, batches)
        return {**values, "loss": values["loss"] * float("nan")} if run.step == 4 else values

    monkeypatch.setattr(train, "train_step", breaks)
    run = config(save_every=2, steps=8)
    with pytest.raises(LLM2CLIPError, match="loss is nan at step 5"):
        train_student(run)
    assert sorted(path.name for path in (run.out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_the_manifest_says_what_went_in(config, bank, tiny_tower, tmp_path) -> None:
    with_prompt = tmp_path / "bank"
    shutil.copytree(bank, with_prompt)
    facts = read_json(bank / "manifest.json")
    facts["teacher"]["prompt"] = "query: "
    write_json(with_prompt / "manifest.json", facts)
    out = train_student(config(steps=1, ema=0.5, bank=(str(with_prompt),)))
    manifest, of_bank = read_manifest(out, "student"), read_manifest(bank, "bank")
    saved = Student.from_pretrained(out)
    assert manifest["fingerprint"] == tensors_fingerprint(saved.state_dict())
    assert manifest["bank_fingerprints"] == [of_bank["fingerprint"]]
    assert manifest["teacher_fingerprint"] == of_bank["teacher"]["fingerprint"]
    assert manifest["tower_fingerprint"] == tensors_fingerprint(load_file(tiny_tower / "model.safetensors"))
    assert (manifest["teacher_dim"], manifest["projection_dim"]) == (8, 16)
    assert (manifest["image_size"], manifest["num_samples"], manifest["steps"]) == (32, 24, 1)
    assert manifest["best_score"] is None and manifest["prompt"] == "query: "


def test_a_revision_picks_the_tower_and_its_image_processor(config, tiny_tower, tmp_path, monkeypatch) -> None:
    """A Hub cache with two commits of one tower: the branch has another processor and other weights."""
    repository, old, new = tmp_path / "hub" / "models--org--tower", "0" * 40, "1" * 40
    for commit in (old, new):
        (repository / "snapshots" / commit).mkdir(parents=True)
        for path in tiny_tower.iterdir():
            (repository / "snapshots" / commit / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_tower / "model.safetensors")
    changed = repository / "snapshots" / new
    save_file({k: v + 1 for k, v in weights.items()}, changed / "model.safetensors", metadata={"format": "pt"})
    text = (changed / "preprocessor_config.json").read_text()
    assert "0.48145466" in text
    (changed / "preprocessor_config.json").write_text(text.replace("0.48145466", "0.25"))
    (repository / "refs").mkdir()
    for name, commit in (("v1", old), ("main", new)):
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, wanted, mean in (("v1", weights, 0.48145466), (None, load_file(changed / "model.safetensors"), 0.25)):
        settings = config(tower="org/tower", tower_revision=revision)
        run = Session(settings, start_accelerator(settings))
        assert all(torch.equal(value, wanted[name]) for name, value in run.student.tower.state_dict().items())
        assert run.transform.mean[0] == run.student.config.image_mean[0] == mean


def test_a_finished_student_is_trained_further(config, bank, tmp_path) -> None:
    """All of it goes on, on a bank of its own teacher alone; killed, that run goes on as any other."""
    first = train_student(config(steps=2))
    further = config(steps=3, tower=str(first), dim=None, out=tmp_path / "further")
    run = Session(further, start_accelerator(further))
    before = load_file(first / "model.safetensors")
    for name, value in run.student.state_dict().items():
        torch.testing.assert_close(value.cpu(), before[name])
    again = train_student(further)
    after = load_file(again / "model.safetensors")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    other = write_test_bank(tmp_path / "other", image_samples(tmp_path / "images", 24), teacher="u" * 16).folder
    wrong = config(steps=3, tower=str(first), dim=None, bank=(str(other),), out=tmp_path / "wrong")
    with pytest.raises(
        UsageError, match=r"is a student of teacher t{16}, bank .*other is of u{16}; build the bank with"
    ):
        train_student(wrong)
