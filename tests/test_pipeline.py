"""LLM2CLIP in use: vectors of images and texts, the teacher that fits, folders that are no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip import LLM2CLIP
from llm2clip.bundle import save_bundle
from llm2clip.data.bad import BadImage
from llm2clip.errors import ArtifactError, UsageError
from llm2clip.pipeline import Teacher
from llm2clip.protocols import ImageEncoder, TextEncoder
from llm2clip.student.model import Student
from llm2clip.teacher.model import load_teacher

TEXTS = ["a red disc", "this image shows a small blue square .", "a"]


@pytest.fixture(scope="module")
def model(finished_student: Path, finished_teacher: Path) -> LLM2CLIP:
    return LLM2CLIP.from_pretrained(finished_student, teacher=finished_teacher, device="cpu")


def copy_with(folder: Path, to: Path, **facts: object) -> Path:
    """A copy of a student whose manifest says `facts`."""
    shutil.copytree(folder, to)
    manifest = json.loads((to / "manifest.json").read_text())
    (to / "manifest.json").write_text(json.dumps({**manifest, **facts}))
    return to


def test_images_and_texts_are_those_of_the_student(
    model: LLM2CLIP, finished_student: Path, finished_teacher: Path, images_csv: Path
) -> None:
    files = sorted(images_csv.parent.glob("*.jpg"))[:5]
    student = Student.from_pretrained(finished_student).eval()
    vectors = torch.tensor(load_teacher(finished_teacher, device="cpu").encode(TEXTS))
    pixels = torch.stack([model.transform(Image.open(file)) for file in files])
    with torch.no_grad():
        image, text, _ = student(pixels, vectors)
    np.testing.assert_allclose(model.encode_image(files, batch_size=2), image.numpy(), atol=1e-6)
    np.testing.assert_allclose(model.encode_text(TEXTS, batch_size=2), text.numpy(), atol=1e-6)


def test_vectors_are_float32_of_unit_length_in_the_order_given(model: LLM2CLIP, images_csv: Path) -> None:
    files = sorted(images_csv.parent.glob("*.jpg"))
    image, text = model.encode_image(files, batch_size=7), model.encode_text(TEXTS)
    assert (image.dtype, text.dtype) == (np.float32, np.float32)
    assert (image.shape, text.shape) == ((24, 24), (3, 24)) and model.dim == 24
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([image, text]), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.encode_image(files[::-1], batch_size=5), image[::-1], atol=1e-6)
    assert np.abs(image[0] - image[1]).max() > 1e-3


def test_a_image_may_be_a_path_bytes_or_opened(model: LLM2CLIP, images_csv: Path) -> None:
    file = images_csv.parent / "000.jpg"
    with Image.open(file) as opened:
        vectors = model.encode_image([str(file), file, file.read_bytes(), opened, np.asarray(opened)])
    np.testing.assert_allclose(vectors, vectors[:1].repeat(5, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"array float32 \[8, 8, 3\] is no image; write it as uint8"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"array uint8 \[1, 8, 8, 3\] is no image"),
        (torch.zeros(3, 32, 32), r"tensor torch.float32 \[3, 32, 32\] is not what prepare_image gives"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"give pixels of other sizes as an array"),
        (None, "not as NoneType"),
    ],
)
def test_what_is_no_image_is_told_in_a_line(model: LLM2CLIP, image: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.encode_image([image])


def test_a_grey_array_is_a_image(model: LLM2CLIP) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    vectors = model.encode_image([grey, np.stack([grey] * 3, axis=2)])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_what_is_no_text_is_named(model: LLM2CLIP) -> None:
    with pytest.raises(UsageError, match="number 1 of 2 is None"):
        model.encode_text(["a red disc", None])


def test_nothing_gives_no_rows(model: LLM2CLIP) -> None:
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 24)


def test_a_bad_image_is_named(model: LLM2CLIP, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"bad\.jpg"):
        model.encode_image([tmp_path / "bad.jpg"])


@pytest.mark.parametrize("call", ["encode_image", "encode_text"])
def test_a_single_input_instead_of_a_list_is_an_error(model: LLM2CLIP, call: str) -> None:
    with pytest.raises(UsageError, match=f"{call} takes a list, not str; write for example"):
        getattr(model, call)("cat.jpg")


def test_another_teacher_is_refused_with_both_fingerprints(
    finished_student: Path, finished_teacher: Path, tmp_path: Path
) -> None:
    other = copy_with(finished_student, tmp_path / "other", teacher_fingerprint="0123456789abcdef")
    with pytest.raises(UsageError, match=r"has fingerprint [0-9a-f]{16}, the student .* with 0123456789abcdef"):
        LLM2CLIP.from_pretrained(other, teacher=finished_teacher)


def test_a_teacher_of_another_width_is_refused_with_both_widths(
    finished_student: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_llm, hidden_size=16, intermediate_size=32)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"gives 16 numbers a text, the student .* reads 32"):
        LLM2CLIP.from_pretrained(finished_student, teacher=tmp_path)


def test_without_a_teacher_only_images(finished_student: Path, images_csv: Path) -> None:
    model = LLM2CLIP.from_pretrained(finished_student)
    assert model.encode_image([images_csv.parent / "000.jpg"]).shape == (1, 24)
    with pytest.raises(UsageError, match="without its teacher"):
        model.encode_text(TEXTS)


def test_the_prompt_of_the_bank_is_put_before_texts(
    model: LLM2CLIP, finished_student: Path, finished_teacher: Path, tmp_path: Path
) -> None:
    prompted = copy_with(finished_student, tmp_path / "prompted", prompt="the image ")
    again = LLM2CLIP.from_pretrained(prompted, teacher=finished_teacher, device="cpu")
    # the teacher's own encode puts it there; its own tokens are not pooled in this teacher
    vectors = torch.tensor(load_teacher(finished_teacher, device="cpu").encode(TEXTS, prompt="the image "))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.student.get_text_features(vectors), dim=-1).numpy()
    found = again.encode_text(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - model.encode_text(TEXTS)).max() > 1e-3


@pytest.mark.parametrize("prompt", ["the image ", "", None])
def test_an_exported_folder_puts_the_same_prompt_before_texts(
    prompt: str | None, finished_student: Path, finished_teacher: Path, tmp_path: Path
) -> None:
    """The bank's, if there was one; "" is the bank's word for none, whatever the teacher's own default."""
    teacher = load_teacher(finished_teacher, device="cpu")
    teacher.prompts, teacher.default_prompt_name = {"query": "this shows "}, "query"
    plain = LLM2CLIP.from_pretrained(finished_student, device="cpu")
    model = LLM2CLIP(plain.student, plain.transform, teacher, prompt=prompt)
    save_bundle(tmp_path, model.student, model.transform, teacher, prompt=prompt)
    vectors = torch.tensor(teacher.encode(TEXTS, prompt="this shows " if prompt is None else prompt))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(plain.student.get_text_features(vectors), dim=-1).numpy()
    alone = LLM2CLIP.from_pretrained(tmp_path, device="cpu")
    np.testing.assert_allclose(model.encode_text(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(alone.encode_text(TEXTS), expected, atol=1e-5)
    half = LLM2CLIP.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    assert {p.dtype for part in (half.student, half.teacher) for p in part.parameters()} == {torch.bfloat16}


def test_more_texts_than_fit_at_once(model: LLM2CLIP) -> None:
    texts = [f"{word} {shape}" for word in ("a", "the", "one", "two") for shape in ("disc", "square", "shape")]
    np.testing.assert_allclose(model.encode_text(texts, batch_size=1), model.encode_text(texts), atol=1e-6)


def test_options_reach_student_and_teacher(
    finished_student: Path, finished_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from llm2clip.teacher import model as teacher_module

    asked: list[tuple[object, ...]] = []

    def snapshot(name: str, *, revision: str | None = None, **options: object) -> str:
        asked.append((name, revision))
        return str(finished_student)

    def load(name: str, **options: object) -> object:
        asked.append((name, options))
        return load_teacher(finished_teacher, device="cpu")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(teacher_module, "load_teacher", load)
    model = LLM2CLIP.from_pretrained(
        "org/student",
        "org/teacher",
        device="cpu",
        dtype="bfloat16",
        revision="s1",
        teacher_revision="t1",
        trust_remote_code=True,
    )
    options = {"revision": "t1", "device": torch.device("cpu"), "dtype": "bfloat16", "trust_remote_code": True}
    assert asked == [("org/student", "s1"), ("org/teacher", options)]
    assert model.student.dtype == torch.bfloat16
    manifest = json.loads((finished_student / "manifest.json").read_text())
    assert model.origin == {
        "teacher_fingerprint": manifest["teacher_fingerprint"],
        "tower": "a/tower",
        "steps": 3,
        "batch_size": 8,
    }


def test_lower_precision_gives_float32_close_to_the_full_one(
    model: LLM2CLIP, finished_student: Path, finished_teacher: Path, images_csv: Path
) -> None:
    half = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu", dtype="bfloat16")
    assert half.student.visual_projection.weight.dtype == torch.bfloat16
    image = half.encode_image([images_csv.parent / "000.jpg"])
    assert image.dtype == np.float32
    assert float(image[0] @ model.encode_image([images_csv.parent / "000.jpg"])[0]) > 0.999
    assert ((half.encode_text(TEXTS) * model.encode_text(TEXTS)).sum(1) > 0.995).all()


def test_folders_that_are_no_student(tmp_path: Path, finished_teacher: Path, finished_student: Path) -> None:
    with pytest.raises(UsageError, match="is no student"):
        LLM2CLIP.from_pretrained(finished_teacher)
    with pytest.raises(UsageError, match="is no folder"):
        LLM2CLIP.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"^'' is no folder"):
        LLM2CLIP.from_pretrained("")
    with pytest.raises(UsageError, match="is no folder here, and the Hub cannot be reached"):
        LLM2CLIP.from_pretrained("nobody/nothing")
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "manifest.json").write_text('{"format": "llm2clip/bank"}')
    with pytest.raises(UsageError, match="is no model: it holds a bank"):
        LLM2CLIP.from_pretrained(tmp_path / "bank")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is unfinished"):
        LLM2CLIP.from_pretrained(tmp_path / "begun")
    other = copy_with(finished_student, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "projection_dim": 8}))
    with pytest.raises(ArtifactError, match=r"do not fit its config\.json: .* is \[24\], expected \[8\]"):
        LLM2CLIP.from_pretrained(other)
    damaged = copy_with(finished_student, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ArtifactError, match="cannot be loaded as a student"):
        LLM2CLIP.from_pretrained(damaged)


def test_a_device_that_is_not_there(finished_student: Path, finished_teacher: Path) -> None:
    for cls, folder in ((LLM2CLIP, finished_student), (Teacher, finished_teacher)):
        with pytest.raises(UsageError, match=r"the device 'cuda:99' cannot be used .*; leave it out or write cpu"):
            cls.from_pretrained(folder, device="cuda:99")


def test_teacher_alone_encodes_texts(finished_teacher: Path) -> None:
    vectors = Teacher.from_pretrained(finished_teacher, device="cpu").encode_text(TEXTS)
    expected = torch.nn.functional.normalize(torch.tensor(load_teacher(finished_teacher).encode(TEXTS)), dim=-1)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_protocols(model: LLM2CLIP, finished_teacher: Path) -> None:
    teacher = Teacher.from_pretrained(finished_teacher)
    assert isinstance(model, TextEncoder) and isinstance(model, ImageEncoder) and isinstance(teacher, TextEncoder)
    assert not isinstance(teacher, ImageEncoder)


def test_texts_are_read_as_captions_of_a_table_are(
    finished_student: Path, finished_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """White space around a text is no part of it, whatever the teacher would make of it."""
    model = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    read: list[str] = []
    encode = model.teacher.encode
    monkeypatch.setattr(
        model.teacher, "encode", lambda texts, **options: read.extend(texts) or encode(texts, **options)
    )
    np.testing.assert_array_equal(model.encode_text([" a red disc \n"]), model.encode_text(["a red disc"]))
    assert read == ["a red disc"] * 2
