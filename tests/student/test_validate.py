"""The validation score: by hand, and on a bank with an image that cannot be read."""

import contextlib
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from llm2clip.artifacts import read_manifest
from llm2clip.data.images import load_image
from llm2clip.data.sample import ImageRef
from llm2clip.errors import LLM2CLIPError, UsageError
from llm2clip.student import validate as validate_module
from llm2clip.student.validate import StudentEncoder, bank_samples, open_evaluators, validate

from ..eval.lookalikes import write
from .banks import colour, image_samples, log, small_run, write_test_bank
from .test_data import TRANSFORM


class Fixed:
    """Three images, each a direction of its own, and captions that lie on the image of their number."""

    def images(self, samples):
        return list(range(len(samples))), torch.eye(3)

    def texts(self, texts):
        return torch.eye(3)[texts]


def test_scores_by_hand(monkeypatch) -> None:
    captions = {
        "short": [[0], [1], [2]],
        "long": [[0], [2, 2], [1]],  # both captions of sample 1 lie on image 2, and that of 2 on image 1
        "zh": [[], [], [2]],  # what some images lack is not in its pool
    }
    bank = SimpleNamespace(
        num_samples=3,
        kinds=list(captions),
        image=lambda number: ImageRef(f"{number}.png"),
        rows=lambda sample, kind: np.array(captions[kind][sample], dtype=int),
    )
    monkeypatch.setattr(validate_module, "StudentEncoder", lambda *parts, **options: Fixed())
    student = SimpleNamespace(training=False, eval=lambda: None, train=lambda mode: None)
    scores = validate(student, None, bank, None, open_evaluators(bank, (), None, None))
    assert list(scores.items()) == [
        ("val/short/i2t_r@1", 1),
        ("val/short/t2i_r@1", 1),
        ("val/long/i2t_r@1", pytest.approx(1 / 3)),
        ("val/long/t2i_r@1", pytest.approx(1 / 4)),
        ("val/zh/i2t_r@1", 1),
        ("val/zh/t2i_r@1", 1),
        ("val/r@1", pytest.approx((4 + 1 / 3 + 1 / 4) / 6)),
    ]


def test_on_a_bank(tiny_llm, tiny_tower, images_csv, tmp_path, caplog) -> None:
    """Against ranks counted in numpy; an image that cannot be read is left out, and the captions of it."""
    from accelerate import Accelerator

    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig
    from llm2clip.bank.reader import Bank
    from llm2clip.student.start import open_transform, start_student

    folder = tmp_path / "images"
    shutil.copytree(images_csv.parent, folder)
    config = BankConfig(data=(str(folder / "captions.csv"),), teacher=str(tiny_llm), out=tmp_path / "bank")
    bank = Bank.open(build_bank(config))
    (folder / "003.jpg").write_bytes(b"")
    torch.manual_seed(0)
    student, transform = (
        start_student(str(tiny_tower), teacher_dim=bank.dim, projection_dim=8),
        open_transform(str(tiny_tower)),
    )
    with caplog.at_level("WARNING", logger="llm2clip"):
        own = open_evaluators(bank, (), None, None)
        scores = validate(student.train(), Accelerator(cpu=True), bank, transform, own)
    assert student.training and "1 of 24 images cannot be read" in caplog.text
    validate(student.eval(), Accelerator(cpu=True), bank, transform, own)
    assert not student.training
    good = [i for i in range(24) if i != 3]
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(folder / f"{i:03d}.jpg")) for i in good])
        image = normalize(student.get_image_features(pixels), dim=1).numpy()
        expected = {}
        for kind in bank.kinds:
            rows = np.concatenate([bank.rows(i, kind) for i in good])
            vectors = torch.from_numpy(bank.vectors(rows)).float()
            cosines = image @ normalize(student.get_text_features(vectors), dim=1).numpy().T
            for way, matrix in (("i2t", cosines), ("t2i", cosines.T)):
                ranks = (matrix >= np.diag(matrix)[:, None] - 1e-6).sum(1)
                expected[f"val/{kind}/{way}_r@1"] = (ranks == 1).mean()
    assert any(expected.values()), "nothing is found: no score is shown"
    expected["val/r@1"] = np.mean(list(expected.values()))
    assert scores == pytest.approx(expected)


def test_the_model_is_in_evaluation_mode_and_in_its_precision(tmp_path, monkeypatch) -> None:
    bank = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "images", 3))
    modes, sizes, inside = [], [], []

    @contextlib.contextmanager
    def autocast():
        inside.append(True)
        yield
        inside.pop()

    class Watched(torch.nn.Module):
        def get_image_features(self, pixels):
            modes.append((self.training, len(inside), torch.is_grad_enabled()))
            return pixels.flatten(1)[:, :4].float()

        def get_text_features(self, vectors):
            modes.append((self.training, len(inside), torch.is_grad_enabled()))
            return vectors[:, :4]

    def noted(ref, *, min_size=None):
        sizes.append(min_size)
        return load_image(ref, min_size=min_size)

    monkeypatch.setattr(validate_module, "load_image", noted)
    accelerator = SimpleNamespace(device="cpu", process_index=0, num_processes=1, autocast=autocast)
    validate(Watched().train(), accelerator, bank, TRANSFORM, open_evaluators(bank, (), None, None))
    assert set(modes) == {(False, 1, False)} and sizes == [48] * 3


def test_more_captions_than_are_encoded_at_once() -> None:
    """9,000 captions: three parts."""
    vectors = np.random.default_rng(0).normal(size=(9000, 4)).astype(np.float32)
    parts = []
    student = SimpleNamespace(get_text_features=lambda part: parts.append(len(part)) or 2 * part)
    accelerator = SimpleNamespace(device="cpu", autocast=contextlib.nullcontext)
    bank = SimpleNamespace(vectors=vectors.__getitem__)
    rows = np.random.default_rng(1).permutation(9000).tolist()
    found = StudentEncoder(student, accelerator, bank, TRANSFORM).texts(rows)
    np.testing.assert_array_equal(found.numpy(), 2 * vectors[rows])
    assert parts == [4096, 4096, 808]


def test_all_processes_call_the_model_equally_often(tmp_path, monkeypatch) -> None:
    """Or those that share shards would wait for each other for ever: 9 images, one unreadable, on 4 processes."""
    bank = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "images", 9))
    (tmp_path / "images" / "p008.png").write_bytes(b"")
    monkeypatch.setattr(validate_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(validate_module, "_all_parts", lambda parts, world: parts)
    calls, seen = [], []
    student = SimpleNamespace(
        get_image_features=lambda pixels: calls.append(rank) or pixels.flatten(1)[:, :4].float(),
    )
    for rank in range(4):
        accelerator = SimpleNamespace(
            device="cpu", process_index=rank, num_processes=4, autocast=contextlib.nullcontext
        )
        encoder = StudentEncoder(student, accelerator, bank, TRANSFORM)
        numbers, vectors = encoder.images(bank_samples(bank))
        assert len(numbers) == len(vectors) and all(number % 4 == rank for number in numbers)
        seen += numbers
    assert [calls.count(rank) for rank in range(4)] == [2, 2, 2, 2]
    assert sorted(seen) == list(range(8))


def test_a_bank_whose_images_are_gone(tmp_path) -> None:
    bank = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "images", 3))
    shutil.rmtree(tmp_path / "images")
    student = torch.nn.Module()
    student.get_image_features = lambda pixels: pixels.flatten(1)[:, :4].float()
    student.get_text_features = lambda vectors: vectors[:, :4]
    accelerator = SimpleNamespace(device="cpu", process_index=0, num_processes=1, autocast=torch.no_grad)
    with pytest.raises(LLM2CLIPError, match="none of its 3 images"):
        validate(student, accelerator, bank, TRANSFORM, open_evaluators(bank, (), None, None))


CLASSES = ("disc", "square", "star")
BOTH = ("class-folders", "urban1k")


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour(number)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two benchmarks: twelve images of three classes, and Urban1k as it is distributed."""
    files = {f"class-folders/{CLASSES[i % 3]}/{i}.png": png(i) for i in range(12)}
    files["class-folders/zeroshot_classification_templates.txt"] = "a small {c}\nthe {c} of glass"
    for i in range(1, 1001):
        files |= {f"urban1k/image/{i}.jpg": png(i), f"urban1k/caption/{i}.txt": f"a red disc, number {i} of many"}
    return write(tmp_path_factory.mktemp("root"), files)


@pytest.fixture(scope="module")
def asked(root, tiny_llm, tmp_path_factory) -> Path:
    """The bank of what they ask."""
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    out = tmp_path_factory.mktemp("asked") / "bank"
    return build_bank(BankConfig(benchmark=BOTH, root=str(root), teacher=str(tiny_llm), out=out, dtype="float32"))


def test_scores_on_benchmarks_are_those_that_evaluate_gives(
    root, asked, tiny_llm, tiny_tower, images_csv, tmp_path
) -> None:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig
    from llm2clip.bank.reader import Bank
    from llm2clip.eval.config import EvaluateConfig
    from llm2clip.eval.run import evaluate
    from llm2clip.student.config import StudentConfig
    from llm2clip.student.train import train_student

    table = Bank.open(asked)
    assert sorted(table.kinds) == sorted(BOTH) and table.num_rows == 1009  # three classes in three sentences
    assert {table.text(row) for sample in range(9) for row in table.rows(sample)} == {
        f"{before} {name}{after}"
        for name in CLASSES
        for before, after in (("a small", ""), ("the", " of glass"), ("a photo of a", "."))
    }
    bank = build_bank(BankConfig(data=(str(images_csv),), teacher=str(tiny_llm), out=tmp_path / "bank"))
    settings = {"steps": 2, "val_bank": str(asked), "val": BOTH, "val_root": str(root), "val_every": 2}
    out = tmp_path / "student"
    train_student(StudentConfig(**small_run(bank, tiny_tower, **settings), out=out, val_score="urban1k/t2i_ndcg@10"))
    report = evaluate(
        EvaluateConfig(
            model=str(out),
            teacher=str(tiny_llm),
            benchmark=BOTH,
            root=str(root),
            out=tmp_path / "report",
            precision="fp32",
            baseline="none",
        )
    )
    scores = log(out)[-1]
    assert {name: scores[f"val/{name}"] for name in report["metrics"]} == pytest.approx(report["metrics"], abs=1e-6)
    got = report["metrics"]
    mean = (got["class-folders/top1"] + (got["urban1k/i2t_r@1"] + got["urban1k/t2i_r@1"]) / 2) / 2
    assert scores["val/r@1"] == pytest.approx(mean, abs=1e-6)
    assert read_manifest(out, "student")["best_score"] == pytest.approx(got["urban1k/t2i_ndcg@10"], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"benchmarks": ("class-folders", "docci")}, "docci"),
        ({"score": "urban1k/t2i_r@2"}, "val_score"),
        ({"benchmarks": ()}, "holds texts without images; give val"),
    ],
)
def test_what_cannot_be_scored_is_told_before_the_first_step(root, asked, changes, said) -> None:
    from llm2clip.bank.reader import Bank

    settings = {"benchmarks": BOTH, "root": str(root), "score": None} | changes
    with pytest.raises(LLM2CLIPError, match=said):
        open_evaluators(Bank.open(asked), **settings)


def test_texts_that_the_bank_lacks_are_counted(root, asked, tmp_path) -> None:
    from llm2clip.bank.reader import Bank

    other = shutil.copytree(root / "class-folders", tmp_path / "class-folders")
    (other / "zeroshot_classification_templates.txt").write_text("a large {c}")
    with pytest.raises(UsageError, match="lacks 3 of 6 texts of class-folders, such as 'a large disc'; build it with"):
        open_evaluators(Bank.open(asked), ("class-folders",), str(tmp_path), None)


def test_an_unreadable_image_of_a_benchmark_ends_the_score(root, asked, tmp_path) -> None:
    from llm2clip.bank.reader import Bank

    own = shutil.copytree(root / "class-folders", tmp_path / "class-folders")
    (own / "star" / "5.png").write_bytes(b"")
    bank = Bank.open(asked)
    student = torch.nn.Module()
    student.get_image_features = lambda pixels: pixels.flatten(1)[:, :4].float()
    accelerator = SimpleNamespace(device="cpu", process_index=0, num_processes=1, autocast=torch.no_grad)
    evaluators = open_evaluators(bank, ("class-folders",), str(tmp_path), None)
    with pytest.raises(LLM2CLIPError, match=r"class-folders: image star/5.png cannot be read"):
        validate(student, accelerator, bank, TRANSFORM, evaluators)


def test_images_of_several_processes_come_in_their_order(root, asked, monkeypatch) -> None:
    """A benchmark's labels are in the order of its images: 12 on 3 processes."""
    from llm2clip.bank.reader import Bank

    bank, parts = Bank.open(asked), {}
    (evaluator,) = open_evaluators(bank, ("class-folders",), str(root), None)["class-folders"]
    student = SimpleNamespace(get_image_features=lambda pixels: pixels.flatten(1)[:, :4].float())

    def gathered(own, world):
        """What the processes so far gave; each calls it for vectors, then for what is unreadable."""
        step = parts.setdefault((world, next(calls)), {})
        step[rank] = own
        return [part for one in sorted(step) for part in step[one]]

    monkeypatch.setattr(validate_module, "_all_parts", gathered)
    found = {}
    for world in (1, 3):
        for rank in (*range(world), 0):  # the first once more, when all have given theirs
            calls = iter(("vectors", "unreadable"))
            accelerator = SimpleNamespace(
                device="cpu", process_index=rank, num_processes=world, autocast=contextlib.nullcontext
            )
            encoder = StudentEncoder(student, accelerator, bank, TRANSFORM, benchmark="class-folders")
            found[world] = encoder.images(evaluator.samples)
    assert found[1][0] == found[3][0] == list(range(12))
    assert torch.equal(found[1][1], found[3][1])
    assert not torch.equal(found[1][1][0], found[1][1][1]), "no two images are alike"
