"""A student begins as the CLIP or SigLIP that its tower is half of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from llm2clip.artifacts import read_manifest
from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankConfig
from llm2clip.bank.reader import Bank
from llm2clip.errors import LLM2CLIPError, UsageError
from llm2clip.student import train as training
from llm2clip.student.config import StudentConfig
from llm2clip.student.inheritance import inherit as inheriting
from llm2clip.student.inheritance.inherit import Inheritance, distance, fit, open_text_half, read, take_over
from llm2clip.student.inheritance.keep import Objective
from llm2clip.student.model import Student
from llm2clip.student.start import open_tower, start_student
from llm2clip.student.train import train_student

from ..banks import small_run
from ..forks import side_by_side

SIDE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["a red disc", "a blue square on the left", "two discs"]


@pytest.fixture(scope="module")
def models(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny CLIP (12 dimensions) and a tiny SigLIP (32), whole: both halves, tokenizer, image processor."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    vision = {**SIDE, "image_size": 32, "patch_size": 8}
    text = {**SIDE, "vocab_size": 128}
    clip = t.CLIPConfig(
        text_config={**text, "max_position_embeddings": 12, "eos_token_id": 2}, vision_config=vision, projection_dim=12
    )
    t.CLIPModel(clip).save_pretrained(root / "clip")
    siglip = t.SiglipConfig(
        text_config={**text, "max_position_embeddings": 12, "projection_size": 32}, vision_config=vision
    )
    t.SiglipModel(siglip).save_pretrained(root / "siglip")
    for name in ("clip", "siglip"):
        t.AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(root / name)
        t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
            root / name
        )
    return {name: root / name for name in ("clip", "siglip")}


@pytest.fixture(scope="module")
def bank(tiny_llm: Path, images_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("banks") / "bank"
    return build_bank(BankConfig(data=(str(images_csv),), teacher=str(tiny_llm), out=out))


@pytest.fixture(scope="module")
def more_text(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of captions without images, of a text file."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "captions.txt").write_text("\n".join(f"a {size} thing" for size in ("tiny", "huge", "flat")) + "\n\n")
    config = BankConfig(
        data=(str(folder / "captions.txt"),), teacher=str(tiny_llm), out=folder / "bank", text_only=True
    )
    return build_bank(config)


def run(bank: Path, tower: Path, out: Path, **settings: object) -> StudentConfig:
    return StudentConfig(**{**small_run(bank, tower), "out": out, "dim": None, "steps": 2, **settings})


def own_vectors(folder: Path, texts: list[str]) -> torch.Tensor:
    """The text half's vectors, by transformers alone."""
    model, tokenizer = t.AutoModel.from_pretrained(folder), t.AutoTokenizer.from_pretrained(folder)
    if model.config.model_type == "siglip":
        tokens = tokenizer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
        tokens = {"input_ids": tokens["input_ids"]}
    else:
        tokens = tokenizer(texts, padding=True, max_length=12, truncation=True, return_tensors="pt")
        tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model.get_text_features(**tokens)
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)


@pytest.mark.parametrize(("name", "loss"), [("clip", "softmax"), ("siglip", "sigmoid")])
def test_images_scale_and_bias_are_the_models(models: dict[str, Path], name: str, loss: str) -> None:
    tower = open_tower(str(models[name]))
    half = open_text_half(tower)
    assert half is not None and half.width == {"clip": 12, "siglip": 32}[name]
    torch.manual_seed(0)
    student = start_student(tower, teacher_dim=8, projection_dim=half.width + 3, adaptor_blocks=1, loss=loss).eval()
    fresh = student.visual_projection.weight[half.width :].clone()
    take_over(student, half)
    assert torch.equal(student.visual_projection.weight[half.width :], fresh) and fresh.abs().min() > 0
    model = t.AutoModel.from_pretrained(models[name])
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model.get_image_features(pixels)
        torch.testing.assert_close(
            student.get_image_features(pixels)[:, : half.width], getattr(wanted, "pooler_output", wanted)
        )
    torch.testing.assert_close(student.logit_scale.detach(), model.logit_scale.detach().view(1))
    if loss == "sigmoid":
        torch.testing.assert_close(student.logit_bias.detach(), model.logit_bias.detach().view(1))


def test_a_text_half_in_a_pickle_is_read_for_tensors(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(models["clip"], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    tower = open_tower(str(folder))
    half = open_text_half(tower)
    assert half is not None and half.width == 12
    vectors = half.encoder.encode_text(TEXTS)
    torch.testing.assert_close(torch.from_numpy(vectors), own_vectors(models["clip"], TEXTS), atol=1e-5, rtol=0)
    take_over(start_student(tower, teacher_dim=8, projection_dim=12, adaptor_blocks=1), half)
    torch.save(
        {name: value for name, value in weights.items() if "text_projection" not in name}, folder / "pytorch_model.bin"
    )
    with pytest.raises(
        UsageError, match=r"lacks weights, such as text_projection.weight; to start without its text half"
    ):
        open_text_half(tower)
    for name in inheriting.TOKENIZERS:
        (folder / name).unlink(missing_ok=True)
    assert open_text_half(open_tower(str(folder))) is None


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_captions_are_read_once_each_as_the_text_half_reads_them(
    models: dict[str, Path], name: str, bank: Path, more_text: Path
) -> None:
    half = open_text_half(open_tower(str(models[name])))
    banks = [Bank.open(bank), Bank.open(more_text)]
    found = read(half, banks, num_training=1)
    texts = [banks[number].text(row) for number, row in found.places.tolist()]
    whole = [banks[0].text(row) for row in range(banks[0].num_rows) if len(banks[0].text(row).split()) < 10]
    assert len(whole) == 24, "long ones do not fit"
    assert texts == [*whole, "a tiny thing", "a huge thing", "a flat thing"]
    torch.testing.assert_close(found.own.float(), own_vectors(models[name], texts), atol=1e-3, rtol=0)
    vectors, own = found.batch(np.array([26, 0, 24]), torch.device("cpu"))
    assert torch.equal(own, found.own[[26, 0, 24]].float())
    for vector, (number, row) in zip(vectors, found.places[[26, 0, 24]].tolist(), strict=True):
        assert np.array_equal(vector.numpy(), banks[number].vectors([row])[0].astype(np.float32))


def test_kinds_that_are_named_are_read_cut(models: dict[str, Path], bank: Path, more_text: Path, caplog) -> None:
    half, banks = open_text_half(open_tower(str(models["clip"]))), [Bank.open(bank), Bank.open(more_text)]
    found = read(half, banks, kinds=["long"], num_training=1)
    texts = [banks[number].text(row) for number, row in found.places.tolist()]
    assert len(texts) == 24 + 3 and all(text.startswith("this image shows") for text in texts[:24])
    torch.testing.assert_close(found.own.float(), own_vectors(models["clip"], texts), atol=1e-3, rtol=0)
    with pytest.raises(UsageError, match=r"inherit_kinds 'dense' is unknown; choose from long, short"):
        read(half, banks, kinds=["dense"], num_training=1)
    half.encoder.context = 3
    with pytest.raises(UsageError, match=r"none of the 48 captions has at most 3 tokens, which"):
        read(half, banks[:1])


def test_of_very_many_captions_some_are_drawn(models: dict[str, Path], bank: Path, monkeypatch) -> None:
    monkeypatch.setattr(inheriting, "MOST_CAPTIONS", 10)
    places = inheriting._choose([Bank.open(bank)], kinds=[], num_training=None, seed=0)
    assert len({row for _, row in places.tolist()}) == 10 and (np.diff(places[:, 1]) > 0).all()
    other = inheriting._choose([Bank.open(bank)], kinds=[], num_training=None, seed=1)
    assert not np.array_equal(places, other)


def test_the_distance_by_hand() -> None:
    own = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    text = torch.tensor([[0.0, 5.0, 9.0], [3.0, 4.0, -9.0]])  # right angle: 2; same direction: 0
    assert distance(text, own).item() == pytest.approx(1.0)


def test_a_map_that_is_there_is_found(bank: Path) -> None:
    """The half's vectors are a rotation of the teacher's: an adaptor can say them."""
    found = Bank.open(bank)
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(found.dim, found.dim))[0][:, :6]
    places = np.stack([np.zeros(found.num_rows, np.int64), np.arange(found.num_rows)], axis=1)
    vectors = torch.from_numpy(found.vectors(places[:, 1]).astype(np.float32))
    own = torch.nn.functional.normalize(vectors @ turn, dim=-1)
    from llm2clip.student.adaptor import Adaptor

    adaptor = Adaptor(found.dim, 9, num_blocks=1)
    before = distance(adaptor(vectors), own).item()
    left = fit(adaptor, Inheritance([found], places, own.half()), seed=0)
    assert before > 0.5 and left < 0.02
    assert distance(adaptor(vectors), own).item() == pytest.approx(left, abs=0.01)


def test_a_training_begins_as_the_clip_and_is_made_from_its_beginning_again(
    models: dict[str, Path], bank: Path, more_text: Path, tmp_path: Path
) -> None:
    still = {"learning_rate": 1e-12, "adaptor_learning_rate": 1e-12, "weight_decay": 0.0}
    out = train_student(run(bank, models["clip"], tmp_path / "a", inherit_bank=(str(more_text),), **still))
    student = Student.from_pretrained(out)
    assert read_manifest(out, "student")["projection_dim"] == student.config.projection_dim == 12
    assert not (out / inheriting.FILE).exists(), "it is of use to a run alone"
    clip = t.CLIPModel.from_pretrained(models["clip"])
    torch.testing.assert_close(student.visual_projection.weight, clip.visual_projection.weight)
    found = Bank.open(bank)
    short = [row for row in range(found.num_rows) if len(found.text(row).split()) < 10]
    own = own_vectors(models["clip"], found.texts(short))
    with torch.no_grad():
        text = student.get_text_features(torch.from_numpy(found.vectors(short).astype(np.float32)))
    assert distance(text, own) < 0.2 * distance(torch.randn_like(text), own)


def test_what_was_inherited_is_not_computed_again(models, bank, tmp_path, monkeypatch) -> None:
    config = run(bank, models["clip"], tmp_path)
    banks, half = [Bank.open(bank)], open_text_half(open_tower(str(models["clip"])))
    students = []
    for _ in range(3):
        torch.manual_seed(0)
        student = start_student(str(models["clip"]), teacher_dim=banks[0].dim, projection_dim=12, adaptor_blocks=1)
        found = inheriting.inherit(student, half, banks, config, out=tmp_path, tower="t")
        students.append((student.state_dict(), found.own))
        monkeypatch.setattr(inheriting, "read", lambda *_, **__: pytest.fail("it is there"))
    assert all(torch.equal(students[0][0][name], students[1][0][name]) for name in students[0][0])
    assert torch.equal(students[0][1], students[2][1])
    with pytest.raises(pytest.fail.Exception):
        inheriting.inherit(student, half, banks, config, out=tmp_path, tower="another")
    (tmp_path / inheriting.FILE).write_bytes(b"cut short")
    with pytest.raises(pytest.fail.Exception):
        inheriting.inherit(student, half, banks, config, out=tmp_path, tower="t")


def test_a_cache_serves_other_runs_of_the_same_and_no_others(models, bank, tmp_path, monkeypatch) -> None:
    banks, half, cache = [Bank.open(bank)], open_text_half(open_tower(str(models["clip"]))), tmp_path / "cache"

    def begin(name: str, **changes) -> dict[str, torch.Tensor]:
        config = run(bank, models["clip"], tmp_path / name, inherit_cache=str(cache), **changes)
        torch.manual_seed(0)
        student = start_student(str(models["clip"]), teacher_dim=banks[0].dim, projection_dim=12, adaptor_blocks=1)
        inheriting.inherit(student, half, banks, config, out=tmp_path / name, tower="t")
        return student.state_dict()

    first = begin("a")
    assert len(list(cache.glob("*.safetensors"))) == 1 and not (tmp_path / "a" / inheriting.FILE).exists()
    begin("other", inherit_noise=0.1)
    assert len(list(cache.glob("*.safetensors"))) == 2
    monkeypatch.setattr(inheriting, "read", lambda *_, **__: pytest.fail("it is there"))
    again = begin("b")
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        half.encoder.model.text_projection.weight.mul_(1.5)
    with pytest.raises(pytest.fail.Exception):
        begin("another text half")


@pytest.mark.parametrize(("changes", "weights"), [({}, [1.0]), ({"unlocked_blocks": 0}, []), ({"keep": 0.5}, [0.5])])
def test_a_tower_that_learns_is_held_to_its_own_view(changes, weights, models, bank, tmp_path, monkeypatch) -> None:
    seen: list[float] = []

    def objective(*args, **kept) -> Objective:
        seen.extend([kept["keep"]] if "keep" in kept else [])
        return Objective(*args, **kept)

    monkeypatch.setattr(training, "Objective", objective)
    train_student(run(bank, models["clip"], tmp_path / "out", steps=1, **changes))
    assert seen == weights


def test_towers_without_a_text_half_start_as_they_did(tiny_tower, models, bank, tmp_path, caplog) -> None:
    caplog.set_level("INFO", logger="llm2clip")
    assert open_text_half(open_tower(str(tiny_tower))) is None
    assert "has no text half: there is nothing to inherit" in caplog.messages[-1]
    with pytest.raises(UsageError, match=r"keep=0\.5 needs a tower with a text half, which tower .* has not"):
        train_student(run(bank, tiny_tower, tmp_path / "a", keep=0.5, dim=16))
    bare = tmp_path / "bare"
    t.CLIPModel.from_pretrained(models["clip"]).save_pretrained(bare)
    assert open_text_half(open_tower(str(bare))) is None
    assert "has no tokenizer" in caplog.messages[-1]
    damaged = tmp_path / "damaged"
    t.AutoTokenizer.from_pretrained(models["clip"]).save_pretrained(damaged)
    t.CLIPModel.from_pretrained(models["clip"]).save_pretrained(damaged)
    t.CLIPImageProcessor().save_pretrained(damaged)
    weights = load_file(damaged / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks weights.*; to start without its text half, give inherit='none'"):
        open_text_half(open_tower(str(damaged)))


def test_a_projection_of_other_images_is_refused(models: dict[str, Path]) -> None:
    half = open_text_half(open_tower(str(models["clip"])))
    half.projection = half.projection.flip(0)
    student = start_student(str(models["clip"]), teacher_dim=8, projection_dim=12, adaptor_blocks=1)
    with pytest.raises(LLM2CLIPError, match=r"does not see images as the CLIPModel it comes from \(cosine -?0\.\d+\)"):
        take_over(student, half)


def test_settings_that_do_not_go_together(models, bank, tmp_path) -> None:
    for settings, line in (
        ({"inherit": "none", "keep": 1.0}, r"keep=1\.0 is about what is inherited; leave it or inherit='none' out"),
        ({"init": "random", "inherit_kinds": ("short",)}, r"leave it or init='random' out"),
        ({"keep_text": -1.0}, r"keep_text is -1\.0; it must not be below 0"),
        ({"inherit": "all"}, r"inherit 'all' is unknown; choose from auto, none"),
    ):
        with pytest.raises(UsageError, match=line):
            run(bank, models["clip"], tmp_path, **settings)
    with pytest.raises(UsageError, match=r"dim 8 is below the 12 dimensions that are inherited; leave it out, or give"):
        train_student(run(bank, models["clip"], tmp_path, dim=8))


def test_a_bank_of_text_alone_is_no_bank_of_images(models, bank, more_text, tiny_tower, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"holds captions without images; give it as inherit_bank="):
        train_student(run(more_text, tiny_tower, tmp_path / "a", dim=16))
    assert [Bank.open(more_text).text(row) for row in range(3)] == ["a tiny thing", "a huge thing", "a flat thing"]
    assert json.loads((more_text / "manifest.json").read_text())["config"]["text_only"] is True


@pytest.mark.ci
@pytest.mark.own_process
def test_two_processes_inherit_the_same_as_one(models: dict[str, Path], bank: Path, tmp_path: Path) -> None:
    """The main process does it, the other takes its result; where keeping costs nothing, they learn the same as one."""
    settings = {"batch_size": 8, "keep_text": 0.0, "keep": 0.5, "min_crop": 1.0}
    whole = run(bank, models["clip"], tmp_path / "one", **settings)
    shared = run(bank, models["clip"], tmp_path / "two", **settings)
    assert side_by_side(1, tmp_path / "alone", lambda rank: train_student(whole)) == [(0, "")]
    assert side_by_side(2, tmp_path / "meeting", lambda rank: train_student(shared)) == [(0, "")] * 2
    weights = [load_file(out / "model.safetensors") for out in (tmp_path / "one", tmp_path / "two")]
    one, two = (torch.cat([value.flatten() for value in each.values()]) for each in weights)
    # AdamW makes whole steps of gradients that are rounding alone: a few weights go the other way
    assert (~torch.isclose(two, one, atol=1e-4, rtol=1e-3)).float().mean() < 0.01
    assert not (tmp_path / "two" / inheriting.FILE).exists()
