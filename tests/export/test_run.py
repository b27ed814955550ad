"""export: what each target writes loads elsewhere, gives the same vectors, and is not done before that is seen."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip import LLM2CLIP
from llm2clip.errors import LLM2CLIPError, UsageError
from llm2clip.export import run as run_module
from llm2clip.export.card import write_card
from llm2clip.export.check import PROBE_TEXTS, compare, in_fresh_process, least_cosine, probe_embeds, probe_images
from llm2clip.export.config import ExportConfig
from llm2clip.export.format import find_format, format_names
from llm2clip.export.run import export_model


def snippets(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)


def run_in(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `code` prints when it is run inside `folder`."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def bundle(finished_student: Path, finished_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    (root / "report.json").write_text(json.dumps({"metrics": {"coco/short/i2t_r@1": 0.625}}))
    config = ExportConfig(
        model=str(finished_student),
        teacher=str(finished_teacher),
        to="sentence-transformers",
        out=root / "bundle",
        report=root / "report.json",
    )
    return export_model(config)


def test_bundle_is_checked_in_a_fresh_process_without_llm2clip(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["format"] == "llm2clip/export"
    assert manifest["to"] == "sentence-transformers"
    assert set(manifest["checked"]) == {"text", "query", "document", "image"}
    assert all(cosine > 0.9999 for cosine in manifest["checked"].values())
    assert not list(bundle.glob(".tower*"))


def test_every_call_for_texts_puts_what_the_bank_put_before_them(
    finished_student: Path, finished_teacher: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    from llm2clip.bundle import save_bundle

    source = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    texts = ["a red disc", "a blue square on the left"]
    plain = source.encode_text(texts)
    for prompt in ("this image shows ", None):
        source.prompt = prompt
        if prompt is None:  # an embedder with prompts of its own, of which the bank took the default
            source.teacher.prompts.update(caption="the scene . ", query="near ", document="against ")
            source.teacher.default_prompt_name = "caption"
        folder = tmp_path / str(prompt).strip()
        folder.mkdir()
        save_bundle(folder, source.student, source.transform, source.teacher, prompt=prompt)
        bundle = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        expected = source.encode_text(texts)
        assert least_cosine(expected, plain) < 0.9999, "the prompt changes nothing: nothing is shown"
        for encode in (bundle.encode, bundle.encode_query, bundle.encode_document):
            np.testing.assert_allclose(encode(texts), expected, atol=1e-5)


def test_bundle_alone_is_the_model(bundle: Path, finished_student: Path, finished_teacher: Path) -> None:
    source = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    alone = LLM2CLIP.from_pretrained(bundle, device="cpu")
    texts, images = [*PROBE_TEXTS, "a red disc", "a blue square"], probe_images()
    np.testing.assert_allclose(alone.encode_text(texts), source.encode_text(texts), atol=1e-5)
    np.testing.assert_allclose(alone.encode_image(images), source.encode_image(images), atol=1e-5)
    assert np.ptp(alone.encode_text(texts), axis=0).max() > 0.05, "all texts look alike: nothing was shown"
    with pytest.raises(UsageError, match="holds its own teacher"):
        LLM2CLIP.from_pretrained(bundle, finished_teacher)


def test_bundle_stays_two_way(bundle: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(bundle), trust_remote_code=True, device="cpu")
    first_module = model[0].sub_modules["text"][0]
    features = model.preprocess(["a red disc on the left", "a red disc on the right"])
    states = first_module(dict(features))["token_embeddings"]
    assert (states[0, 0] - states[1, 0]).abs().max() > 1e-4, "the first token does not see the last one"


def test_bundle_saved_again_loads_again(bundle: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(bundle), trust_remote_code=True, device="cpu")
    model.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(model.encode(["a red disc"]), again.encode(["a red disc"]))


def test_the_adaptor_survives_the_way_to_another_process(bundle: Path) -> None:
    import pickle

    from sentence_transformers import SentenceTransformer

    adaptor = SentenceTransformer(str(bundle), trust_remote_code=True, device="cpu")[0].sub_modules["text"][-2]
    again = pickle.loads(pickle.dumps(adaptor))
    assert all((a == b).all() for a, b in zip(adaptor.parameters(), again.parameters(), strict=True))


def test_bundle_needs_trust_in_sentence_transformers(bundle: Path) -> None:
    from sentence_transformers import SentenceTransformer

    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(bundle), device="cpu")


def test_the_snippets_of_the_card_run(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe_images()[0].save(bundle / "cat.jpg")
    card = (bundle / "README.md").read_text()
    assert "| coco/short/i2t_r@1 | 62.5 |" in card
    assert "`a/tower (clip_vision_model)`" in card
    printed = [run_in(bundle, code, monkeypatch, capsys) for code in snippets(card)]
    plain, ours = (np.array(re.findall(r"-?\d\.\d+", text), float) for text in printed)
    assert len(plain) == 2
    np.testing.assert_allclose(plain, ours, atol=2e-4)


def test_a_finished_export_is_not_written_again(
    bundle: Path, finished_student: Path, finished_teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (bundle / "README.md").stat().st_mtime_ns
    options = {
        "model": str(finished_student),
        "teacher": str(finished_teacher),
        "report": bundle.parent / "report.json",
    }
    with caplog.at_level("INFO", logger="llm2clip"):
        export_model(ExportConfig(to="sentence-transformers", out=bundle, **options))
    assert "already complete" in caplog.text
    assert (bundle / "README.md").stat().st_mtime_ns == before


def test_a_student_trained_anew_is_not_taken_for_exported(finished_student: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(finished_student, student)

    def mark(fingerprint: str) -> None:
        manifest = json.loads((student / "manifest.json").read_text())
        (student / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": fingerprint}))

    mark("first")
    config = ExportConfig(model=str(student), to="tower", out=tmp_path / "tower", device="cpu")
    export_model(config)
    export_model(config)
    mark("second")
    with pytest.raises(UsageError, match="when it had fingerprint first; it has second now"):
        export_model(config)


@pytest.mark.ci
def test_transformers_folder(
    finished_student: Path,
    finished_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = export_model(ExportConfig(model=str(finished_student), to="transformers", out=tmp_path / "model"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert all(cosine > 0.9999 for cosine in manifest["checked"].values())
    # it still knows its teacher
    source = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    model = LLM2CLIP.from_pretrained(out, finished_teacher, device="cpu")
    np.testing.assert_allclose(model.encode_text(["a red disc"]), source.encode_text(["a red disc"]), atol=1e-6)
    assert manifest["teacher_fingerprint"] == source.origin["teacher_fingerprint"]
    probe_images()[0].save(out / "cat.jpg")
    (code,) = snippets((out / "README.md").read_text())
    assert "tensor(" in run_in(out, code, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("settings", "told"), [({"unlocked_blocks": 0}, 1), ({"unlocked_blocks": 0, "lora_rank": 4}, 0), ({}, 0)]
)
def test_a_tower_that_did_not_learn_is_said_to_be_as_it_was(
    finished_student: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    told: int,
) -> None:
    student = shutil.copytree(finished_student, tmp_path / "student")
    manifest = json.loads((student / "manifest.json").read_text())
    changed = {**manifest, "config": {**manifest["config"], **settings}}
    (student / "manifest.json").write_text(json.dumps(changed))
    for name in ("_reload", "compare"):  # of others' interest
        monkeypatch.setattr(run_module, name, lambda *_: {})
    export_model(ExportConfig(model=str(student), to="tower", out=tmp_path / "tower", device="cpu"))
    line = "the tower did not learn (train-student unlocked_blocks=0): it is exported as it was before"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [line] * told


def test_tower_folder_is_of_its_own_family(
    finished_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPVisionModel

    out = export_model(ExportConfig(model=str(finished_student), to="tower", out=tmp_path / "tower"))
    source = LLM2CLIP.from_pretrained(finished_student)
    tower, report = CLIPVisionModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in source.student.tower.state_dict().items():
        assert (tower.state_dict()[name] == value).all()
    assert json.loads((out / "manifest.json").read_text())["checked"]["image"] > 0.9999
    probe_images()[0].save(out / "cat.jpg")
    (code,) = snippets((out / "README.md").read_text())
    assert "torch.Size([1, 17, 32])" in run_in(out, code, monkeypatch, capsys)


def test_a_folder_with_other_vectors_is_not_called_done(
    finished_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2clip.export.formats import tower

    def damage(model: LLM2CLIP, folder: Path) -> None:
        model.student.tower.embeddings.class_embedding.data.mul_(-20)
        tower.write(model, folder)

    monkeypatch.setattr(tower, "FORMAT", dataclasses.replace(tower.FORMAT, write=damage))
    config = ExportConfig(model=str(finished_student), to="tower", out=tmp_path / "tower")
    with pytest.raises(LLM2CLIPError, match="gives other image vectors than the model it was made from"):
        export_model(config)
    assert not (tmp_path / "tower" / "manifest.json").exists()
    monkeypatch.undo()
    assert (export_model(config) / "manifest.json").exists()  # the same command goes on


def test_wrong_use_is_told_in_a_line(finished_student: Path, finished_teacher: Path, tmp_path: Path) -> None:
    student, teacher, out = str(finished_student), str(finished_teacher), tmp_path / "out"
    with pytest.raises(UsageError, match="add teacher='DIR'"):
        ExportConfig(model=student, to="sentence-transformers", out=out)
    with pytest.raises(UsageError, match="did you mean 'tower'"):
        ExportConfig(model=student, to="towre", out=out)
    with pytest.raises(UsageError, match="is no student"):
        export_model(ExportConfig(model=teacher, to="tower", out=out))
    with pytest.raises(UsageError, match="is no file; give the report"):
        export_model(ExportConfig(model=student, to="tower", out=out, report=tmp_path / "report.json"))
    (tmp_path / "report.json").write_text("no report")
    with pytest.raises(UsageError, match="holds no metrics; give the report"):
        export_model(ExportConfig(model=student, to="tower", out=out, report=tmp_path / "report.json"))


@pytest.mark.ci
def test_a_folder_that_needs_llm2clip_does_not_pass(tmp_path: Path) -> None:
    from llm2clip.export.formats.transformers import encode

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llm2clip"}))
    with pytest.raises(LLM2CLIPError, match="does not load in a fresh process: "):
        in_fresh_process(encode, tmp_path, device="cpu", in_float32=False, teacher_dim=32)


def needy(folder: str, probes: Path, device: str, in_float32: bool) -> dict[str, object]:
    import llm2clip

    return {"image": llm2clip.__name__}


@pytest.mark.ci
def test_the_fresh_process_cannot_import_llm2clip(tmp_path: Path) -> None:
    with pytest.raises(LLM2CLIPError, match="import of llm2clip halted"):
        in_fresh_process(needy, tmp_path, device="cpu", in_float32=False)


DUMMY = '''
"""--to dummy: one number."""

import numpy as np

from llm2clip.export.format import Format


def write(model, folder):
    (folder / "number.txt").write_text("1")


def expect(model):
    return {"image": np.ones((1, 1), np.float32)}


def reload(folder, facts, device, in_float32):
    return {"image": np.full((1, 1), float((folder / "number.txt").read_text()), np.float32)}


FORMAT = Format(
    title="A number", library="none", task="other", contents="One of {{ dim }}.", use="Read it.",
    write=write, expect=expect, reload=reload,
)
'''


def test_a_format_is_one_file(finished_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2clip.export import formats

    assert format_names() == ["onnx", "open-clip", "sentence-transformers", "tower", "transformers"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a_number.py").write_text(DUMMY)
    with monkeypatch.context() as added:
        added.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "more")])
        assert "a-number" in format_names()
        out = export_model(ExportConfig(model=str(finished_student), to="a-number", out=tmp_path / "out"))
        assert (out / "number.txt").read_text() == "1" and "# A number\n\nOne of " in (out / "README.md").read_text()
        assert json.loads((out / "manifest.json").read_text())["checked"] == {"image": 1.0}
    with pytest.raises(UsageError, match="'a-number' is unknown; choose from onnx, open-clip, sentence-transformers"):
        ExportConfig(model=str(finished_student), to="a-number", out=out)


def test_probe_images_are_the_same_every_time_and_differ() -> None:
    first, again, others = probe_images(), probe_images(), probe_images(seed=1)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert all(one.tobytes() != other.tobytes() for one, other in zip(first, others, strict=True))
    assert [image.size for image in first] == [(320, 240), (200, 300), (64, 64), (97, 500)]
    small = [np.asarray(image.resize((6, 6)), float) for image in first]
    assert all(values.std() > 20 for values in small), "nothing is to be seen on one"
    assert min(np.abs(a - b).mean() for i, a in enumerate(small) for b in small[:i]) > 20, "two look alike"
    embeds = probe_embeds(32)
    assert embeds.shape == (4, 32) and (embeds == probe_embeds(32)).all() and (embeds != probe_embeds(32, seed=1)).all()


def test_vectors_that_are_not_the_same() -> None:
    one = np.eye(2, dtype=np.float32)
    assert compare(Path("x"), {"text": one, "image": one}, {"text": 3 * one, "image": one}) == {"text": 1, "image": 1}
    # cosines of 0.99989 and 0.99991, of one row in two
    for turn, passes in ((0.01483, False), (0.01342, True)):
        turned = np.array([[1, 0], [np.sin(turn), np.cos(turn)]], np.float32)
        for name in ("text", "image"):
            found = {"text": one, "image": one, name: turned}
            if passes:
                assert compare(Path("x"), {"text": one, "image": one}, found)[name] == pytest.approx(np.cos(turn))
            else:
                with pytest.raises(LLM2CLIPError, match=f"gives other {name} vectors"):
                    compare(Path("x"), {"text": one, "image": one}, found)
    for wrong in (one * np.nan, one[:1], np.eye(3), one * 0):
        assert least_cosine(one, wrong) == -1


FACTS = {
    "to": "tower",
    "dim": 24,
    "teacher_dim": 32,
    "tower_dim": 48,
    "tower_type": "vit",
    "tower_class": "ViTModel",
    "pooling": "cls",
    "load_options": {"add_pooling_layer": False},
    "image_size": [224, 336],
    "tower": "/home/me/towers/vit",
    "teacher_fingerprint": "t" * 16,
    "fingerprint": "f" * 16,
    "num_samples": 900,
    "steps": 70,
    "batch_size": 8,
}


@pytest.mark.parametrize("kind", ["sentence-transformers", "transformers", "tower", "onnx", "open-clip"])
def test_a_card_by_hand(kind: str, tmp_path: Path) -> None:
    write_card(tmp_path, find_format(kind), {**FACTS, "to": kind}, scores={"b/r@1": 0.25, "a/r@1": 0.5})
    card = (tmp_path / "README.md").read_text()
    library, task = {
        "sentence-transformers": ("sentence-transformers", "sentence-similarity"),
        "transformers": ("transformers", "image-feature-extraction"),
        "tower": ("transformers", "image-feature-extraction"),
        "onnx": ("onnx", "image-feature-extraction"),
        "open-clip": ("open_clip", "zero-shot-image-classification"),
    }[kind]
    assert card.startswith(f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- llm2clip\n")
    assert "images of 336 x 224 px" in card
    rows = [
        f"| {name} | `{value}` |"
        for name, value in (
            ("tower", "vit (vit)"),
            ("fingerprint of the teacher", "t" * 16),
            ("fingerprint", "f" * 16),
            ("num samples", 900),
            ("steps", 70),
            ("batch size", 8),
        )
    ]
    assert "\n".join(["| what | which |", "|---|---|", *rows]) in card
    assert "## Scores\n\n| metric | % |\n|---|---|\n| a/r@1 | 50.0 |\n| b/r@1 | 25.0 |\n" in card
    if kind == "tower":
        assert 'ViTModel.from_pretrained(".", add_pooling_layer=False)' in card and "have 48 numbers" in card
        write_card(tmp_path, find_format(kind), {**FACTS, "pooling": "pooler", "load_options": {}}, scores=None)
        card = (tmp_path / "README.md").read_text()
        assert "add_pooling_layer" not in card and "## Scores" not in card


def test_settings_and_revisions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[object, ...]] = []

    class Opened(Exception):
        pass

    def opener(*names: object, **options: object) -> None:
        asked.append((*names, options))
        raise Opened

    monkeypatch.setattr(LLM2CLIP, "from_pretrained", opener)
    config = ExportConfig(
        model="M",
        teacher="T",
        to="tower",
        out=tmp_path / "out",
        device="cpu",
        trust_remote_code=True,
        model_revision="m1",
        teacher_revision="t1",
    )
    with pytest.raises(Opened):
        export_model(config)
    options = {
        "device": torch.device("cpu"),
        "dtype": "auto",
        "revision": "m1",
        "teacher_revision": "t1",
        "trust_remote_code": True,
    }
    assert asked == [("M", "T", options)]
    assert set(config.settings()) == {field.name for field in dataclasses.fields(config)} - {"out", "device"}


def test_what_fails_when_the_folder_is_opened_again_is_one_line(
    finished_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2clip.export.formats import tower

    def reload(*_: object) -> None:
        raise AssertionError("Input height (56) doesn't match\nmodel (84).")

    monkeypatch.setattr(tower, "FORMAT", dataclasses.replace(tower.FORMAT, reload=reload))
    config = ExportConfig(model=str(finished_student), to="tower", out=tmp_path / "tower")
    with pytest.raises(LLM2CLIPError, match=r"does not load again: Input height .56. doesn't match model .84.\.$"):
        export_model(config)
