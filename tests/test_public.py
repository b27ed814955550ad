"""The public names, imported from the package's face, on tiny real inputs; `docs/python.md` runs as it stands."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import llm2clip
from llm2clip import (
    LLM2CLIP,
    Adaptor,
    ArtifactError,
    BadImage,
    Bank,
    BankConfig,
    EvaluateConfig,
    ExportConfig,
    ImageTransform,
    JoinConfig,
    LLM2CLIPError,
    SourceConfig,
    SourceError,
    Student,
    StudentConfig,
    TeacherConfig,
    TooManyBadSamples,
    UsageError,
    build_bank,
    contrastive_loss,
    evaluate,
    export_model,
    join_teachers,
    load_image,
    load_teacher,
    open_source,
    start_student,
    train_student,
    train_teacher,
)

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
STAGES = {build_bank, evaluate, export_model, join_teachers, train_student, train_teacher}


@pytest.fixture(scope="module")
def bank(finished_teacher: Path, images_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """The captions of 24 images by the untrained teacher."""
    settings = BankConfig(
        data=(str(images_csv),),
        teacher=str(finished_teacher),
        out=tmp_path_factory.mktemp("public") / "bank",
        precision="fp32",
        dtype="float32",
        device="cpu",
    )
    return Bank.open(build_bank(settings))


def test_this_file_uses_every_public_name() -> None:
    assert set(llm2clip.__all__) <= set(globals())


@pytest.mark.parametrize("name", llm2clip.__all__)
def test_a_public_name_is_explained(name: str) -> None:
    text = inspect.getdoc(getattr(llm2clip, name))
    assert text and text.splitlines()[0].endswith((".", ":"))
    if getattr(llm2clip, name) in STAGES:
        assert "Raises:" in text and "Example:" in text


def test_the_loss_of_two_pairs_by_hand() -> None:
    image, text, scale = torch.eye(2, requires_grad=True), torch.eye(2), torch.tensor(math.log(3))
    loss = contrastive_loss(image, text, scale)  # scores ln 3 and 0: softmax gives the right one 3 of 4
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-6)
    loss.backward()
    # scale * (softmax - target) = ln 3 * (3/4 - 1); both directions alike, a mean over two
    assert torch.allclose(image.grad, math.log(3) / 8 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    sigmoid = contrastive_loss(image, text, scale, bias=torch.tensor(0.0), kind="sigmoid")
    assert sigmoid.item() == pytest.approx((2 * math.log(4 / 3) + 2 * math.log(2)) / 2, abs=1e-6)
    with pytest.raises(UsageError):
        contrastive_loss(image, text[:1], scale)


def test_an_adaptor_by_its_parameters_and_shapes() -> None:
    adaptor = Adaptor(8, 4, num_blocks=2)
    block = 2 * 8 + (8 * 16 + 16) + (16 * 8 + 8)  # norm, there, back
    assert sum(p.numel() for p in adaptor.parameters()) == 2 * block + 2 * 8 + (8 * 4 + 4)
    vectors = torch.randn(3, 8)
    assert adaptor(vectors).shape == (3, 4) and adaptor(vectors).dtype == torch.float32
    torch.testing.assert_close(adaptor(5 * vectors), adaptor(vectors))  # of unit length first
    assert adaptor(vectors.half()).dtype == torch.float32


def test_a_student_starts_around_a_tower(tiny_tower: Path, tmp_path: Path) -> None:
    student = start_student(str(tiny_tower), teacher_dim=16, projection_dim=8)
    assert isinstance(student, Student)
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    image = student.get_image_features(pixels)
    assert image.shape == (2, 8) and student.get_text_features(torch.ones(5, 16)).shape == (5, 8)
    assert student.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(Student.from_pretrained(tmp_path).get_image_features(pixels), image)
    with pytest.raises(UsageError):
        start_student(str(tmp_path / "nowhere"), teacher_dim=16)


def test_pixels_of_a_known_image(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 255))
    image.putpixel((2, 1), (9, 9, 9, 0))  # transparent: on white
    image.save(tmp_path / "image.png")
    pixels = ImageTransform(image_size=(2, 2), resize=2)(load_image(tmp_path / "image.png"))  # columns 1 and 2
    assert pixels.dtype == torch.uint8
    assert pixels.permute(1, 2, 0).tolist() == [[[0, 0, 255], [255, 0, 0]], [[255, 0, 0], [255, 255, 255]]]
    (tmp_path / "image.png").write_bytes(b"no image")
    with pytest.raises(BadImage) as caught:
        load_image(tmp_path / "image.png")
    assert caught.value.cause == "not an image" and isinstance(caught.value, LLM2CLIPError)


def test_a_source_is_read(images_csv: Path, tmp_path: Path) -> None:
    samples = list(open_source(SourceConfig(data=(str(images_csv),))))
    assert len(samples) == 24
    assert samples[0].captions["short"] == ("a small red disc",)
    assert load_image(samples[0].image).size == (48, 40)
    with pytest.raises(UsageError, match="nowhere"):
        open_source(SourceConfig(data=(str(tmp_path / "nowhere.csv"),)))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError):
        open_source(SourceConfig(data=(str(tmp_path / "cut.parquet"),)))


def test_a_bank_holds_the_teachers_vectors(bank: Bank, finished_teacher: Path, tmp_path: Path) -> None:
    assert (bank.num_samples, bank.dim, sorted(bank.kinds)) == (24, 32, ["long", "short"])
    rows = bank.rows(0, "short")
    expected = load_teacher(finished_teacher, device="cpu").encode([bank.text(rows[0])])
    torch.testing.assert_close(torch.tensor(bank.vectors(rows)), torch.tensor(expected), atol=1e-5, rtol=0)
    with pytest.raises(UsageError):
        Bank.open(tmp_path)
    copy = shutil.copytree(bank.folder, tmp_path / "copy")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError):
        Bank.open(copy)


def test_too_many_bad_samples_stop_a_bank(finished_teacher: Path, images_csv: Path, tmp_path: Path) -> None:
    for name in ("captions.csv", "000.jpg"):  # without the other images
        shutil.copy(images_csv.parent / name, tmp_path / name)
    settings = BankConfig(data=(str(tmp_path / "captions.csv"),), teacher=str(finished_teacher), out=tmp_path / "bank")
    with pytest.raises(TooManyBadSamples, match="23 of 24"):
        build_bank(settings)


def test_a_model_encodes_both_sides(finished_student: Path, finished_teacher: Path, images_csv: Path) -> None:
    model = LLM2CLIP.from_pretrained(finished_student, teacher=finished_teacher, device="cpu")
    images = [images_csv.parent / "000.jpg", Image.new("RGB", (40, 40), "blue")]
    image, text = model.encode_image(images), model.encode_text(["a small red disc"])
    assert image.shape == (2, 24) and text.shape == (1, 24)
    for vectors in (image, text):
        torch.testing.assert_close(torch.tensor(vectors).norm(dim=1), torch.ones(len(vectors)))
    pixels = model.transform(load_image(images[0]))[None]
    features = torch.nn.functional.normalize(model.student.get_image_features(pixels), dim=1)
    torch.testing.assert_close(torch.tensor(image[:1]), features.detach())


def test_a_student_is_trained_on_a_bank(bank: Bank, tiny_tower: Path, tmp_path: Path) -> None:
    settings = StudentConfig(
        bank=(str(bank.folder),),
        tower=str(tiny_tower),
        out=tmp_path / "student",
        steps=1,
        batch_size=4,
        precision="fp32",
        workers=0,
        tracker="none",
    )
    assert train_student(settings) == tmp_path / "student"
    assert Student.from_pretrained(tmp_path / "student").config.teacher_dim == bank.dim


def test_stages_refuse_what_is_no_model_in_one_line(images_csv: Path, tmp_path: Path) -> None:
    """Whole runs of each stage are in the tests of its folder, and in the page's examples below."""
    empty, out, data = tmp_path / "empty", tmp_path / "out", (str(images_csv),)
    empty.mkdir()
    for call in (
        lambda: train_teacher(TeacherConfig(data=data, model=str(empty), out=out, steps=1)),
        lambda: join_teachers(JoinConfig(teachers=(str(empty), str(empty)), out=out)),
        lambda: evaluate(EvaluateConfig(model=str(empty), data=data, out=out)),
        lambda: export_model(ExportConfig(model=str(empty), to="tower", out=out)),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(empty) in str(caught.value) and "\n" not in str(caught.value)
        assert not (out / "manifest.json").exists()


def test_errors_are_one_tree() -> None:
    for error in (ArtifactError, BadImage, SourceError, TooManyBadSamples, UsageError):
        assert issubclass(error, LLM2CLIPError)
    assert issubclass(UsageError, ValueError)
    assert (UsageError.exit_code, SourceError.exit_code) == (2, 1)


def test_the_page_names_every_public_name_and_new_names_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {name for name in llm2clip.__all__ if f"`{name}`" not in text} == set()
    rows = re.findall(r"^\| `llm2clip\.[\w.]+` \| `([\w.]+)` \|$", text, flags=re.MULTILINE)
    assert len(rows) > 10
    for name in rows:
        module, _, attribute = name.rpartition(".")
        try:
            assert hasattr(importlib.import_module(module), attribute), name
        except ModuleNotFoundError:
            pytest.fail(f"docs/python.md names {name}, which is not there")


@pytest.mark.ci
def test_the_pages_examples_run(
    images_csv: Path, tiny_llm: Path, tiny_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images_csv.parent, "images")
    (tmp_path / "llm").symlink_to(tiny_llm)
    (tmp_path / "tower").symlink_to(tiny_tower)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert Path("report/report.json").exists() and Path("bundle/manifest.json").exists()
