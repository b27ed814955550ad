"""join-teachers: the members' unit vectors one behind the other, a teacher like any other from there on."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import string
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers as t
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from llm2clip import (
    LLM2CLIP,
    Bank,
    BankConfig,
    EvaluateConfig,
    ExportConfig,
    JoinConfig,
    StudentConfig,
    TeacherConfig,
    build_bank,
    evaluate,
    hub,
    join_teachers,
    load_teacher,
    train_student,
    train_teacher,
)
from llm2clip.bank.load import load_for_encoding
from llm2clip.cli import run
from llm2clip.errors import LLM2CLIPError, UsageError
from llm2clip.export.card import llm_of
from llm2clip.export.run import export_model
from llm2clip.hub import find_model
from llm2clip.teacher import join as joining
from llm2clip.teacher import train as training
from llm2clip.teacher.fingerprint import teacher_fingerprint
from llm2clip.teacher.model import llm_as_encoder, save
from llm2clip.two_towers import ClipEncoder

LONG = "A large BLUE square on the left of the dark background, " * 4 + "near a small red disc"
TEXTS = ["a red disc", "There", LONG]
LAYERS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIDE = {"height": 32, "width": 32}
CONTEXT = 16
CLASSES = {"siglip": "GemmaTokenizer", "siglip2": "Siglip2Tokenizer"}
"""What SigLIP 2 models on the Hub have; a Gemma tokenizer loses a lower-casing step when it is saved and read back."""


def make_two_towers(folder: Path, kind: str, *, tokenizer_of: Path) -> Path:
    """A random CLIP whose tokenizer closes every text with </s>, or a SigLIP that reads letters."""
    from tokenizers.processors import TemplateProcessing

    text = {**LAYERS, "vocab_size": 128, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2}
    image, projected = {**LAYERS, "image_size": 32, "patch_size": 8}, {**text, "projection_size": 20}
    torch.manual_seed(5)
    if kind == "clip":
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=image, projection_dim=24))
        processor = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIDE)
    elif kind == "siglip":
        model = t.SiglipModel(t.SiglipConfig(text_config=projected, vision_config=image))
        processor = t.SiglipImageProcessor(size=SIDE)
    else:
        patches = {**LAYERS, "num_patches": 16, "patch_size": 8}
        model = t.Siglip2Model(t.Siglip2Config(text_config=projected, vision_config=patches))
        processor = t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    if kind in CLASSES:
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters]
        tokenizer = getattr(t, CLASSES[kind])(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    else:
        tokenizer = t.AutoTokenizer.from_pretrained(tokenizer_of)
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_towers(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("two-towers")
    return {kind: make_two_towers(root / kind, kind, tokenizer_of=tiny_llm) for kind in ("clip", "siglip", "siglip2")}


@pytest.fixture(scope="module")
def joined(finished_teacher: Path, two_towers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLM's teacher and the tiny CLIP as one teacher, of width 32 + 24."""
    out = tmp_path_factory.mktemp("joined") / "teacher"
    return join_teachers(JoinConfig(teachers=(str(finished_teacher), str(two_towers["clip"])), out=out))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def join_all(out: Path, *teachers: Path, **settings: object) -> Path:
    return join_teachers(JoinConfig(teachers=tuple(map(str, teachers)), out=out, **settings))


def test_a_vector_is_the_members_unit_vectors_one_behind_the_other(
    joined: Path, finished_teacher: Path, two_towers: dict[str, Path]
) -> None:
    llm_part = unit(load_teacher(finished_teacher, device="cpu").encode(TEXTS))
    clip_part = ClipEncoder.from_pretrained(two_towers["clip"]).encode_text(TEXTS)
    found = load_teacher(joined, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, np.hstack([llm_part, clip_part]), atol=1e-5)
    manifest = json.loads((joined / "manifest.json").read_text())
    assert manifest["format"] == "llm2clip/teacher" and manifest["dim"] == 56
    assert [member["dim"] for member in manifest["members"]] == [32, 24]
    assert manifest["members"][0]["fingerprint"] == teacher_fingerprint(finished_teacher)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_reads_lower_case_padded_text_as_it_was_trained(kind, tiny_llm: Path, two_towers, tmp_path) -> None:
    joined = join_all(tmp_path / "out", two_towers[kind], tiny_llm, weights=(2.0, 0.5))
    parts = (one.from_pretrained(two_towers[kind]) for one in (t.AutoModel, t.AutoTokenizer, t.AutoImageProcessor))
    encoder = ClipEncoder(*parts)  # not opened: SigLIP 2's images have no fixed size, and only texts are asked for
    expected = np.hstack(
        [2 * encoder.encode_text(TEXTS), 0.5 * unit(load_teacher(tiny_llm, device="cpu").encode(TEXTS))]
    )
    teacher = load_teacher(joined, device="cpu")
    assert teacher.get_embedding_dimension() == 20 + 32
    np.testing.assert_allclose(teacher.encode(TEXTS), expected, atol=1e-5)
    assert np.abs(encoder.encode_text(["RED disc"]) - encoder.encode_text(["blue disc"])).max() > 1e-3
    features = teacher.preprocess(["RED disc"])
    assert "0.attention_mask" not in features and features["0.input_ids"].shape == (1, CONTEXT)


def test_a_long_caption_is_cut_for_the_clip_alone_and_keeps_its_closing_token(joined: Path) -> None:
    teacher = load_teacher(joined, device="cpu")
    features = teacher.preprocess([LONG])
    assert features["1.input_ids"].shape == (1, CONTEXT) and features["1.input_ids"][0, -1] == 2
    assert features["0.input_ids"].shape[1] > 40
    one, other = teacher.encode([LONG, LONG + " there"])
    assert np.array_equal(one[32:], other[32:]) and np.abs(one[:32] - other[:32]).max() > 1e-4


def test_the_llm_still_attends_both_ways(joined: Path) -> None:
    for teacher in (load_teacher(joined), SentenceTransformer(str(joined), trust_remote_code=True, device="cpu")):
        llm = teacher[0].sub_modules["0"][0]
        states = llm(llm.preprocess(["a red disc on the left", "a red disc on the right"]))["token_embeddings"]
        assert (states[0, 0] - states[1, 0]).abs().max() > 1e-4, "the first token does not see the last one"


@pytest.mark.ci
def test_a_fresh_process_without_llm2clip_gives_the_same_vectors(joined: Path, tmp_path: Path) -> None:
    code = (
        "import sys, json, numpy; sys.modules['llm2clip'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu')\n"
        "model.save_pretrained(sys.argv[3], create_model_card=False)\n"
        "again = SentenceTransformer(sys.argv[3], trust_remote_code=True, device='cpu')\n"
        "texts = json.loads(sys.argv[4])\n"
        "numpy.save(sys.argv[2], [model.encode(texts), again.encode(texts)])\n"
    )
    place = [str(joined), str(tmp_path / "vectors.npy"), str(tmp_path / "again"), json.dumps(TEXTS)]
    subprocess.run([sys.executable, "-c", code, *place], check=True, cwd=tmp_path)
    expected = load_teacher(joined, device="cpu").encode(TEXTS)
    for found in np.load(tmp_path / "vectors.npy"):
        np.testing.assert_array_equal(found, expected)


def test_no_code_of_the_folder_is_run_by_llm2clip(joined: Path, tmp_path: Path) -> None:
    shutil.copytree(joined, tmp_path / "copy")
    (tmp_path / "copy" / "joined_module.py").write_text("raise SystemExit('run')")
    found = load_teacher(tmp_path / "copy", device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(found, load_teacher(joined, device="cpu").encode(TEXTS))
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(joined), device="cpu")


def test_the_fingerprint_is_that_of_the_members_wherever_they_lie(
    joined: Path, finished_teacher: Path, two_towers: dict[str, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(finished_teacher, tmp_path / "other")
    again = join_all(tmp_path / "again", other, two_towers["clip"])
    assert teacher_fingerprint(again) == teacher_fingerprint(joined) == teacher_fingerprint(load_teacher(joined))
    heavier = join_all(tmp_path / "heavier", other, two_towers["clip"], weights=(1, 2))
    assert teacher_fingerprint(heavier) != teacher_fingerprint(joined)
    tokenizer = next(again.glob("1_0_*/tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text().replace('"disc"', '"disk"'))
    assert teacher_fingerprint(again) != teacher_fingerprint(joined)


def test_a_members_own_prompt_stays_and_another_takes_its_place(tiny_llm: Path, two_towers, tmp_path: Path) -> None:
    with_prompt = load_teacher(tiny_llm, device="cpu")
    with_prompt.prompts, with_prompt.default_prompt_name = {"caption": "this image shows "}, "caption"
    clip = joining.text_half(find_model(two_towers["clip"]))
    joined = joining.join([with_prompt, clip], [1.0, 1.0])
    for prompt in (None, "there "):
        parts = [unit(encoder.encode(TEXTS, prompt=prompt)) for encoder in (with_prompt, clip)]
        np.testing.assert_allclose(joined.encode(TEXTS, prompt=prompt), np.hstack(parts), atol=1e-5)
    np.testing.assert_array_equal(joined.encode(TEXTS, prompt=""), joined.encode(TEXTS))
    joined.save_pretrained(str(tmp_path / "out"), create_model_card=False)
    np.testing.assert_array_equal(load_teacher(tmp_path / "out", device="cpu").encode(TEXTS), joined.encode(TEXTS))


def test_every_module_of_a_member_has_its_transformers_dtype(tiny_llm: Path, two_towers, tmp_path: Path) -> None:
    from llm2clip.teacher.tuning import add_adaptor

    deep = load_teacher(tiny_llm, device="cpu")
    add_adaptor(deep, layers=1)
    deep.save_pretrained(str(tmp_path / "deep"), create_model_card=False)
    joined = join_all(tmp_path / "out", tmp_path / "deep", two_towers["clip"])
    half = load_for_encoding(str(joined), device=torch.device("cpu"), precision="bf16")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    whole = load_teacher(joined, device="cpu")
    assert (half.encode(TEXTS) * whole.encode(TEXTS)).sum(1).min() > 1.98


def test_it_can_be_copied_and_sent_to_another_process(joined: Path) -> None:
    teacher = load_teacher(joined, device="cpu")
    for again in (pickle.loads(pickle.dumps(teacher[0])), copy.deepcopy(teacher)[0]):
        model = SentenceTransformer(modules=[again], device="cpu")
        np.testing.assert_array_equal(model.encode(TEXTS), teacher.encode(TEXTS))


@pytest.mark.ci
def test_from_captions_to_a_bundle(joined: Path, tiny_tower: Path, images_csv: Path, tmp_path: Path) -> None:
    teacher, data = str(joined), (str(images_csv),)
    build_bank(BankConfig(data=data, teacher=teacher, out=tmp_path / "bank", precision="fp32", device="cpu"))
    bank = Bank.open(tmp_path / "bank")
    assert bank.dim == 56 and bank.tokens(np.arange(4)).min() > 4
    student = tmp_path / "student"
    settings = {"batch_size": 8, "dim": 16, "workers": 0, "precision": "fp32"}
    train_student(
        StudentConfig(bank=(str(tmp_path / "bank"),), tower=str(tiny_tower), out=student, steps=1, **settings)
    )
    model = LLM2CLIP.from_pretrained(student, teacher, device="cpu")
    evaluate(EvaluateConfig(model=str(student), teacher=teacher, data=data, out=tmp_path / "scores", device="cpu"))
    report = json.loads((tmp_path / "scores" / "report.json").read_text())
    assert any(name.endswith("t2i_r@1") for name in report["metrics"])
    bundle = export_model(
        ExportConfig(model=str(student), teacher=teacher, to="sentence-transformers", out=tmp_path / "b", device="cpu")
    )
    shutil.rmtree(tmp_path / "bank")
    (bundle / "joined_module.py").write_text("raise SystemExit('run')")  # llm2clip runs no code of the folder
    alone = LLM2CLIP.from_pretrained(bundle, device="cpu")
    np.testing.assert_allclose(alone.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-5)
    with pytest.raises(UsageError, match=r"gives 32 numbers a text, the student .* reads 56"):
        LLM2CLIP.from_pretrained(student, json.loads((joined / "manifest.json").read_text())["members"][0]["name"])


def test_the_command_writes_once_and_refuses_other_settings(tiny_llm: Path, two_towers, tmp_path: Path, capsys) -> None:
    words = ["join-teachers", "--teachers", str(tiny_llm), str(two_towers["clip"]), "--out", str(tmp_path / "out")]
    assert run([*words, "--weights", "1", "0.5"]) == 0
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert run([*words, "--weights", "1", "0.5"]) == 0
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert run(words) == 2
    assert "weights was [1.0, 0.5], now []" in capsys.readouterr().err


def test_what_comes_back_is_compared_before_it_is_done(
    tiny_llm: Path, two_towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = joining.load_joined

    def damaged(*args: object, **options: object) -> SentenceTransformer:
        teacher = load(*args, **options)
        teacher[0].sub_modules["0"][0].model.config.is_causal = True
        return teacher

    monkeypatch.setattr(joining, "load_joined", damaged)
    monkeypatch.setattr(joining, "MIN_COSINE", 0.9999999)  # a random LLM hardly attends
    with pytest.raises(LLM2CLIPError, match="gives other vectors than its members"):
        join_all(tmp_path / "out", tiny_llm, two_towers["clip"])
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teachers": ("a",)}, "^teachers names 1; give two or more"),
        ({"weights": (1, 2, 3)}, "^weights has 3 values for 2 teachers"),
        ({"weights": (1, 0)}, "^weights has 0; each must be above 0"),
        ({"weights": (1, float("nan"))}, "^weights has nan"),
        ({"revisions": ("main",)}, "^revisions has 1 values for 2 teachers"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        JoinConfig(**{"teachers": ("a", "b"), "out": "out", **settings})


def test_what_cannot_be_a_member(
    joined: Path, tiny_llm: Path, tiny_tower: Path, finished_student: Path, tmp_path
) -> None:
    wrong = {
        str(tiny_tower): "is a vision model",
        str(tmp_path / "nothing"): "is no folder",
        str(finished_student): "is no teacher .found: student",
        str(joined): "not sentence-transformers' own \\(Joined\\); join others",
    }
    for name, message in wrong.items():
        with pytest.raises(UsageError, match=message):
            join_all(tmp_path / "out", tiny_llm, Path(name))
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UsageError, match="cannot be loaded"):
        join_all(tmp_path / "out", tiny_llm, tmp_path / "empty")


def test_an_adapter_without_its_model_is_no_member(tiny_llm: Path, two_towers, tmp_path: Path, monkeypatch) -> None:
    adapted = load_teacher(tiny_llm, device="cpu")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted[0].model)  # saved, it would be that alone
    monkeypatch.setattr(joining, "load_teacher", lambda *args, **options: adapted)
    with pytest.raises(UsageError, match="is an adapter on another model's weights"):
        join_all(tmp_path / "out", two_towers["clip"], tiny_llm)


def test_a_member_that_is_cut_short_stays_so_and_vectors_are_fp32(tiny_llm: Path, two_towers, tmp_path: Path) -> None:
    short = load_teacher(tiny_llm, device="cpu", dtype=torch.bfloat16)
    short.truncate_dim = 8
    joined = joining.join([short, joining.text_half(find_model(two_towers["clip"]))], [1.0, 1.0])
    joined.save_pretrained(str(tmp_path / "out"), create_model_card=False)
    for teacher in (joined, load_teacher(tmp_path / "out", device="cpu")):
        vectors = teacher.encode(TEXTS, convert_to_tensor=True)
        assert vectors.shape == (3, 8 + 24) and vectors.dtype == torch.float32
        torch.testing.assert_close(vectors[:, :8].norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)


def test_a_context_is_no_longer_than_the_tokenizer_says(two_towers, tmp_path: Path) -> None:
    folder = shutil.copytree(two_towers["clip"], tmp_path / "clip")
    t.AutoTokenizer.from_pretrained(folder, model_max_length=9).save_pretrained(folder)
    half = joining.text_half(find_model(folder))
    assert half.max_seq_length == 9 and half.preprocess([LONG])["input_ids"].shape == (1, 9)


@pytest.mark.ci
def test_train_teacher_joins_what_it_trained(tiny_llm: Path, two_towers, images_csv: Path, tmp_path: Path) -> None:
    settings = {"data": (str(images_csv),), "model": str(tiny_llm), "steps": 2, "batch_size": 4, "precision": "fp32"}
    alone = train_teacher(TeacherConfig(out=tmp_path / "alone", **settings))
    clip = str(two_towers["clip"])
    together = train_teacher(TeacherConfig(out=tmp_path / "together", join=(clip,), **settings))
    one, other = (load_teacher(folder, device="cpu").encode(TEXTS) for folder in (alone, together))
    np.testing.assert_allclose(other[:, :32], unit(one), atol=1e-5)
    np.testing.assert_allclose(other[:, 32:], ClipEncoder.from_pretrained(clip).encode_text(TEXTS), atol=1e-5)
    manifest = json.loads((together / "manifest.json").read_text())
    assert [member["name"] for member in manifest["members"]] == [str(tiny_llm), clip]
    assert manifest["dim"] == 56 and manifest["after"] == json.loads((alone / "manifest.json").read_text())["after"]
    assert teacher_fingerprint(together) == teacher_fingerprint(join_all(tmp_path / "joined", alone, Path(clip)))
    assert not (together / "work").exists() and llm_of(str(together)) == [tiny_llm.name, "clip"]


def test_what_cannot_be_joined_is_told_before_the_training(tiny_llm: Path, tiny_tower, images_csv, tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"tower .*is a vision model"):
        train_teacher(TeacherConfig(data=(str(images_csv),), model=str(tiny_llm), join=(str(tiny_tower),), out=out))
    assert not (out / "run.json").exists()


def test_a_member_from_the_hub_is_of_its_revision(
    tiny_llm: Path, two_towers, images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--clip"
    shutil.copytree(two_towers["clip"], repository / "snapshots" / ("0" * 40))
    other = t.CLIPModel.from_pretrained(shutil.copytree(two_towers["clip"], repository / "snapshots" / ("1" * 40)))
    with torch.no_grad():
        other.text_projection.weight.mul_(torch.linspace(0.5, 2, 32))
    other.save_pretrained(repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    for digit, name in enumerate(("v1", "main")):
        (repository / "refs" / name).write_text(str(digit) * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = {"data": (str(images_csv),), "model": str(tiny_llm), "steps": 1, "batch_size": 4, "precision": "fp32"}
    settings |= {"join": ("org/clip",), "out": tmp_path / "out"}
    found = load_teacher(train_teacher(TeacherConfig(**settings, join_revisions=("v1",))), device="cpu").encode(TEXTS)
    expected = ClipEncoder.from_pretrained(two_towers["clip"]).encode_text(TEXTS)
    np.testing.assert_allclose(found[:, 32:], expected, atol=1e-5)
    with pytest.raises(UsageError, match=r"^join_revisions has 2 values for 1 teachers; give one each"):
        TeacherConfig(**settings, join_revisions=("v1", "main"))


def test_a_join_that_fails_after_the_training_costs_no_checkpoint(
    tiny_llm: Path, two_towers, images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"data": (str(images_csv),), "model": str(tiny_llm), "steps": 2, "batch_size": 4, "save_every": 1}
    config = TeacherConfig(out=tmp_path / "out", join=(str(two_towers["clip"]),), **settings)
    with monkeypatch.context() as patched:
        patched.setattr(training, "open_members", refuse)
        with pytest.raises(UsageError, match="cannot be fetched"):
            train_teacher(config)
    assert list(config.work.glob("*/checkpoint-2"))
    assert load_teacher(train_teacher(config), device="cpu").encode(TEXTS).shape == (3, 56)


def refuse(names: tuple[str, ...], *_: object, what: str = "teachers", **__: object) -> list[SentenceTransformer]:
    """As a Hub does whose token has run out, after the training."""
    if what == "join":
        return []
    raise UsageError(f"{names[1]} cannot be fetched from the Hub")


def test_a_member_keeps_its_dtype_on_any_cpu(tiny_llm: Path, two_towers, tmp_path: Path, monkeypatch) -> None:
    half = tmp_path / "half"
    save(llm_as_encoder(tiny_llm, dtype=torch.bfloat16), half, attention="two-way")
    monkeypatch.setattr(hub, "cpu_has_bf16", lambda: False)
    joined = join_all(tmp_path / "joined", half, two_towers["clip"])
    dtypes = {weight.dtype for file in joined.glob("0_*/**/*.safetensors") for weight in load_file(file).values()}
    assert dtypes == {torch.bfloat16}
