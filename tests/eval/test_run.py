"""evaluate: students, exports, other people's models and teachers on real files, as the report tells it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip import LLM2CLIP
from llm2clip.bundle import save_bundle
from llm2clip.data.config import SourceConfig
from llm2clip.data.source import open_source
from llm2clip.errors import LLM2CLIPError, TooManyBadSamples, UsageError
from llm2clip.eval import models, run
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.run import evaluate, notes_of
from llm2clip.hub import ModelFolder

KEYS = {
    *(f"captions/{kind}/{way}_r@{k}" for kind in ("short", "long") for way in ("i2t", "t2i") for k in (1, 5, 10)),
    "captions/cra",
    "captions/cra_second",
}


@pytest.fixture(scope="module")
def report_folder(
    finished_student: Path, finished_teacher: Path, images_csv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("reports") / "report"
    evaluate(
        EvaluateConfig(
            model=str(finished_student),
            teacher=str(finished_teacher),
            data=(str(images_csv),),
            out=out,
            batch_size=7,
            device="cpu",
        )
    )
    return out


def test_report_json_is_as_documented(report_folder: Path) -> None:
    report = json.loads((report_folder / "report.json").read_text())
    assert set(report["metrics"]) == KEYS
    assert all(0 <= value <= 1 for value in report["metrics"].values())
    assert report["datasets"]["captions"]["images"] == 24
    assert report["datasets"]["captions"]["captions"] == {"short": 24, "long": 24}
    assert report["chance"]["captions/short/i2t_r@1"] == pytest.approx(1 / 24)
    assert report["similarity"]["captions"]["captions"] == 48
    manifest = json.loads((report_folder / "manifest.json").read_text())
    assert manifest["format"] == "llm2clip/report" and manifest["metrics"] == report["metrics"]


def test_scores_are_those_of_the_vectors(
    report_folder: Path, finished_student: Path, finished_teacher: Path, images_csv: Path
) -> None:
    """Every figure from the cosines in numpy; ties count against the model."""
    model = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    rows = list(csv.DictReader(images_csv.read_text().splitlines()))
    image = model.encode_image([images_csv.parent / row["image"] for row in rows])
    text = {kind: model.encode_text([row[f"{kind}_caption"] for row in rows]) for kind in ("short", "long")}
    expected = {}
    for kind, vectors in text.items():
        for way, scores in (("i2t", image @ vectors.T), ("t2i", vectors @ image.T)):
            ranks = (scores >= np.diag(scores)[:, None] - 1e-6).sum(1)
            expected |= {f"captions/{kind}/{way}_r@{k}": (ranks <= k).mean() for k in (1, 5, 10)}
    both = np.concatenate([text["short"], text["long"]])
    scores = both @ both.T
    own = np.take_along_axis(scores, np.roll(np.arange(48), 24)[:, None], 1)
    rivals = np.where(np.eye(48, dtype=bool) | (np.roll(np.eye(48, dtype=bool), 24, 1)), -2, scores)
    expected["captions/cra"] = (rivals.max(1) < own[:, 0] - 1e-6).mean()
    second = text["short"] @ text["long"].T
    expected["captions/cra_second"] = ((second >= np.diag(second)[:, None] - 1e-6).sum(1) == 1).mean()
    metrics = json.loads((report_folder / "report.json").read_text())["metrics"]
    assert metrics == pytest.approx(expected)
    assert len(set(expected.values())) > 4, "the figures are alike: nothing is shown"


def test_every_setting_of_the_sources_reaches_each_dataset() -> None:
    settings: dict[str, Any] = {
        "captions": {"long": "dense"},
        "image": "photo",
        "allow_outside": True,
        "max_bad_fraction": 0.5,
        "revision": "v1",
    }
    parts = run.parts_of(EvaluateConfig(teacher="t", data=("a.csv", "b.csv"), out=Path("x"), **settings))
    assert parts == {name: SourceConfig(data=(f"{name}.csv",), **settings) for name in ("a", "b")}


def test_settings_of_the_models_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    kinds = ("student", "sentence-transformers", "transformers")
    folders = {kind: ModelFolder(tmp_path, kind, kind, {}, {}) for kind in kinds}

    class Opened(Exception):
        pass

    def opener(*names: Any, **options: Any) -> Any:
        asked.append((*names, options))
        raise Opened

    def find_model(name: str, *, revision: str | None = None) -> ModelFolder:
        asked.append((name, revision))
        return folders[name]

    monkeypatch.setattr(models, "find_model", find_model)
    monkeypatch.setattr(models.LLM2CLIP, "from_pretrained", opener)
    monkeypatch.setattr(models.Teacher, "from_pretrained", opener)
    monkeypatch.setattr(models.ClipEncoder, "from_pretrained", opener)
    monkeypatch.setattr(models.SentenceTransformerEncoder, "from_pretrained", opener)
    settings: dict[str, Any] = {
        "data": ("a.csv",),
        "out": tmp_path,
        "device": "cpu",
        "precision": "bf16",
        "trust_remote_code": True,
        "model_revision": "m1",
        "teacher_revision": "t1",
    }
    options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "trust_remote_code": True}
    for names, expected in (
        ({"teacher": "T"}, [("T", {"revision": "t1", **options})]),
        (
            {"model": "student", "teacher": "T"},
            [("student", "m1"), (folders["student"], "T", {"teacher_revision": "t1", **options})],
        ),
        ({"model": kinds[1]}, [(kinds[1], "m1"), (folders[kinds[1]], options)]),
        ({"model": kinds[2]}, [(kinds[2], "m1"), (folders[kinds[2]], options)]),
    ):
        asked.clear()
        with pytest.raises(Opened):
            models.open_encoder(EvaluateConfig(**names, **settings))
        assert asked == expected
    assert {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16} == models.DTYPES
    asked.clear()
    with pytest.raises(Opened):
        models.open_encoder(EvaluateConfig(teacher="T", **{**settings, "precision": "auto"}))
    assert asked[0][1]["dtype"] is None


def test_the_seed_of_the_similarity_figures(images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    similarity = run.similarity_profile

    def noted(texts: Any, owners: Any, *, seed: int) -> Any:
        seeds.append(seed)
        return similarity(texts, owners, seed=seed)

    monkeypatch.setattr(run, "similarity_profile", noted)
    monkeypatch.setattr(run, "open_encoder", lambda config: (Colours(), {"encoder": "colours"}))
    evaluate(EvaluateConfig(model="colours", data=(str(images_csv),), out=tmp_path / "report", seed=7))
    assert seeds == [7]


def test_captions_that_are_cut_are_counted_by_dataset(
    images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cutting(Colours):
        num_cut = 5

        def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
            self.num_cut += sum(len(text.split()) > 5 for text in texts)
            return super().encode_text(texts)

    shutil.copytree(images_csv.parent, tmp_path / "other")
    monkeypatch.setattr(run, "open_encoder", lambda config: (Cutting(), {"encoder": "colours"}))
    data = (str(images_csv), str(tmp_path / "other" / "captions.csv"))
    report = evaluate(EvaluateConfig(model="colours", data=data, out=tmp_path / "report"))
    assert [facts["captions_cut"] for facts in report["datasets"].values()] == [24, 24]


def test_pages_show_the_same_figures(report_folder: Path) -> None:
    metrics = json.loads((report_folder / "report.json").read_text())["metrics"]
    markdown, page = ((report_folder / name).read_text() for name in ("report.md", "report.html"))
    row = [f"{100 * metrics[f'captions/long/t2i_r@{k}']:.1f}" for k in (1, 5, 10)]
    assert f"| long | text → image | model | {' | '.join(row)} |\n" in markdown
    assert "|  |  | by chance | 4.167 | 20.833 | 41.667 |\n" in markdown
    assert "".join(f'<td class="number">{value}</td>' for value in row) in page
    assert "<svg" in page and "http" not in page.replace("https://www.w3.org", "")


def test_again_gives_the_same_bytes_and_is_not_done_twice(
    report_folder: Path,
    finished_student: Path,
    finished_teacher: Path,
    images_csv: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {
        "model": str(finished_student),
        "teacher": str(finished_teacher),
        "data": (str(images_csv),),
    }
    evaluate(EvaluateConfig(**options, out=tmp_path / "again", batch_size=7, device="cpu"))
    for name in ("report.json", "report.md", "report.html", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (report_folder / name).read_bytes()
    with caplog.at_level("INFO", logger="llm2clip"):
        report = evaluate(EvaluateConfig(**options, out=report_folder))
    assert "already complete" in caplog.text and set(report["metrics"]) == KEYS


def test_a_report_of_another_student_or_other_data_is_not_taken_for_done(
    finished_teacher: Path, images_csv: Path, tmp_path: Path
) -> None:
    teacher, data = tmp_path / "teacher", tmp_path / "captions.csv"
    shutil.copytree(finished_teacher, teacher)
    shutil.copy(images_csv, data)
    config = EvaluateConfig(teacher=str(teacher), data=(str(data),), out=tmp_path / "report", device="cpu")
    found = evaluate(config)
    assert evaluate(config) == found
    (teacher / "manifest.json").write_text(json.dumps({"format": "llm2clip/teacher", "fingerprint": "another"}))
    with pytest.raises(UsageError, match=r"when it had fingerprint [0-9a-f]{16}; it has another now"):
        evaluate(config)
    (teacher / "manifest.json").unlink()
    data.write_text(data.read_text().replace("large", "big"))
    with pytest.raises(UsageError, match="data captions has changed since"):
        evaluate(config)


def test_exported_folder_alone_scores_the_same(
    report_folder: Path, finished_student: Path, finished_teacher: Path, images_csv: Path, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    model = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    save_bundle(tmp_path / "bundle", model.student, model.transform, model.teacher, prompt=model.prompt)
    report = evaluate(
        EvaluateConfig(model=str(tmp_path / "bundle"), data=(str(images_csv),), out=tmp_path / "report", device="cpu")
    )
    assert report["metrics"] == json.loads((report_folder / "report.json").read_text())["metrics"]


def test_teacher_alone_scores_captions_and_needs_no_images(
    finished_teacher: Path, images_csv: Path, tmp_path: Path
) -> None:
    shutil.copy(images_csv, tmp_path / "captions.csv")  # its images are not there
    report = evaluate(
        EvaluateConfig(teacher=str(finished_teacher), data=(str(tmp_path / "captions.csv"),), out=tmp_path / "report")
    )
    assert set(report["metrics"]) == {"captions/cra", "captions/cra_second"}
    assert report["model"]["encoder"] == "text encoder" and report["model"]["dim"] == 32
    profile = report["similarity"]["captions"]
    assert sum(profile["positive"]) == 24 and sum(profile["negative"]) == 48 * 47 / 2 - 24
    assert "Retrieval" not in (tmp_path / "report" / "report.md").read_text()


def test_bad_images_are_left_out_and_counted(
    finished_student: Path, finished_teacher: Path, images_csv: Path, tmp_path: Path
) -> None:
    shutil.copytree(images_csv.parent, tmp_path / "data")
    jpeg = (tmp_path / "data" / "003.jpg").read_bytes()
    (tmp_path / "data" / "003.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    options: dict[str, Any] = {
        "model": str(finished_student),
        "teacher": str(finished_teacher),
        "data": (str(tmp_path / "data" / "captions.csv"),),
        "batch_size": 5,
    }
    report = evaluate(EvaluateConfig(**options, out=tmp_path / "report"))
    facts = report["datasets"]["captions"]
    assert facts["images"] == 23 and facts["captions"] == {"short": 23, "long": 23}
    assert facts["bad"]["num_bad"] == 1 and facts["bad"]["counts"] == {"truncated image": 1}
    assert "truncated image" in (tmp_path / "report" / "report.md").read_text()
    with pytest.raises(TooManyBadSamples, match=r"1 of 24 samples are bad, above max_bad_fraction 0\.01"):
        evaluate(EvaluateConfig(**options, out=tmp_path / "strict", max_bad_fraction=0.01))
    assert not (tmp_path / "strict" / "manifest.json").exists()


class Colours:
    """An encoder that sees the mean colour of an image, and knows four words."""

    names = ("red", "green", "blue", "yellow")

    def prepare_image(self, image: Any) -> np.ndarray:
        from llm2clip.data.images import load_image

        return np.asarray(load_image(image), np.float32).mean((0, 1)) - 30

    def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
        red, green, blue = np.stack(images).T
        yellow = np.minimum(red, green)
        return np.stack([red - yellow, green - yellow, blue - yellow, yellow], axis=1)

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        return np.array([[float(name in text) for name in self.names] for text in texts])


def test_any_encoder_is_scored_and_ties_count_against_it(
    images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_encoder", lambda config: (Colours(), {"encoder": "colours"}))
    report = evaluate(EvaluateConfig(model="colours", data=(str(images_csv),), out=tmp_path / "report"))
    # it tells four colours apart, each of six images with one and the same text vector: never first, always sixth
    assert report["metrics"]["captions/short/i2t_r@1"] == 0
    assert report["metrics"]["captions/short/i2t_r@5"] == 0
    assert report["metrics"]["captions/short/i2t_r@10"] == 1


def test_an_encoder_that_gives_nan_is_an_error(
    images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Colours):
        def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
            return np.full((len(texts), 4), np.nan)

    monkeypatch.setattr(run, "open_encoder", lambda config: (Broken(), {}))
    with pytest.raises(LLM2CLIPError, match="gives NaN or infinity for 48 of 48 captions"):
        evaluate(EvaluateConfig(model="broken", data=(str(images_csv),), out=tmp_path / "report"))


def test_several_sources_are_several_datasets(finished_teacher: Path, images_csv: Path, tmp_path: Path) -> None:
    shutil.copy(images_csv, tmp_path / "other.csv")
    data = (str(images_csv), str(tmp_path / "other.csv"))
    report = evaluate(EvaluateConfig(teacher=str(finished_teacher), data=data, out=tmp_path / "report"))
    assert report["metrics"]["captions/cra"] == report["metrics"]["other/cra"]
    assert list(report["datasets"]) == ["captions", "other"]


def test_wrong_use_is_told_in_a_line(
    finished_student: Path, finished_teacher: Path, images_csv: Path, tiny_tower: Path, tmp_path: Path
) -> None:
    data, out = (str(images_csv),), tmp_path / "report"
    with pytest.raises(UsageError, match="nothing to score"):
        EvaluateConfig(data=data, out=out)
    with pytest.raises(UsageError, match="did you mean 'bf16'"):
        EvaluateConfig(teacher="t", data=data, out=out, precision="bf61")
    with pytest.raises(UsageError, match=r"fingerprint [0-9a-f]{16}\); add teacher='DIR'"):
        evaluate(EvaluateConfig(model=str(finished_student), data=data, out=out))
    with pytest.raises(UsageError, match="does not encode images and texts"):
        evaluate(EvaluateConfig(model=str(tiny_tower), data=data, out=tmp_path / "tower"))
    with pytest.raises(UsageError, match="encodes texts only; give it as teacher"):
        evaluate(EvaluateConfig(model=str(finished_teacher), data=data, out=tmp_path / "teacher"))
    with pytest.raises(UsageError, match="encodes texts itself"):
        evaluate(EvaluateConfig(model=str(tiny_tower), teacher="t", data=data, out=tmp_path / "both"))


DUMMY = """
from llm2clip.protocols import Score

NEEDS_IMAGES = False
WORDS = {"one": [0], "two": [1, 2]}  # data of its own, beside the dataset's


class EVALUATOR:
    def __init__(self, samples):
        self.samples = samples

    def run(self, encoder):
        yield Score("dummy/samples", len(self.samples) / 100, chance=0.5, num_images=24)
        yield Score("dummy/width", encoder.texts(list(WORDS)).shape[1] / 10)
"""


def test_an_evaluator_is_one_file(images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a_dummy.py").write_text(DUMMY)
    monkeypatch.setattr(run, "open_encoder", lambda config: (Colours(), {"encoder": "colours"}))
    options: dict[str, Any] = {"model": "colours", "data": (str(images_csv),)}
    plain = evaluate(EvaluateConfig(**options, out=tmp_path / "plain"))
    with monkeypatch.context() as added:
        added.setattr(run.evaluators, "__path__", [*run.evaluators.__path__, str(tmp_path / "more")])
        report = evaluate(EvaluateConfig(**options, out=tmp_path / "with"))
    new = {"captions/dummy/samples": 0.24, "captions/dummy/width": 0.4}
    assert report["metrics"] == {**plain["metrics"], **new}
    assert report["chance"] == {**plain["chance"], "captions/dummy/samples": 0.5}
    page = (tmp_path / "with" / "report.md").read_text()
    assert "| dummy/samples | 24.0 | 11.3 to 43.9 | 50.000 |  |" in page and "| dummy/width | 40.0 |  |  |  |" in page
    assert "- dummy/samples: 24.0 % (95 % interval 11.3 to 43.9), by chance 50.0 %; not above chance\n" in page
    again = evaluate(EvaluateConfig(**options, out=tmp_path / "again"))
    assert again == plain
    assert set(plain["metrics"]) == KEYS


def test_each_text_goes_through_the_model_once(
    images_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Noting(Colours):
        def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
            seen.extend(texts)
            return super().encode_text(texts)

        def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
            seen.extend(["image"] * len(images))
            return super().encode_image(images)

    monkeypatch.setattr(run, "open_encoder", lambda config: (Noting(), {"encoder": "colours"}))
    evaluate(EvaluateConfig(model="colours", data=(str(images_csv),), out=tmp_path / "report"))
    assert seen.count("image") == 24 and len(seen) == 24 + 48 == len(set(seen)) + 23


def test_a_text_encoder_without_pairs_of_captions_is_told_why_it_has_no_score(
    finished_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one.csv").write_text("image,short_caption\na.jpg,a red disc\nb.jpg,a blue square\n")
    options: dict[str, Any] = {"teacher": str(finished_teacher), "data": (str(tmp_path / "one.csv"),)}
    report = evaluate(EvaluateConfig(**options, out=tmp_path / "report"))
    assert report["metrics"] == {}
    why = "there is no score: a text encoder alone is scored on images with two different captions"
    assert why in caplog.text
    assert f"\n- {why}" in (tmp_path / "report" / "report.md").read_text()
    assert f"<li>{why}" in (tmp_path / "report" / "report.html").read_text()


def test_captions_of_several_images_are_told(tmp_path: Path) -> None:
    """Two of five short captions are each other's, of the long ones none; what one image says twice is its own."""
    rows = [("a", "one"), ("b", "one, too"), ("a", "third"), ("c", "fourth"), ("d", "fifth")]
    lines = [f'{i}.jpg,{short},"{long}"' for i, (short, long) in enumerate(rows)]
    (tmp_path / "test.csv").write_text("image,short_caption,long_caption\n" + "\n".join([*lines, lines[-1]]) + "\n")
    for i in range(len(rows)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.jpg")
    source = open_source(SourceConfig(data=(str(tmp_path / "test.csv"),)))
    notes = notes_of({"model": {}, "metrics": {"d/short/i2t_r@1": 0.5}}, "d", source, list(source))["notes"]
    told = "2 of the 5 captions of kind short are those of another image, too"
    assert [note.partition(":")[0] for note in notes] == [told]
