"""The named benchmarks in copies of every layout, with the real numbers of rows, and with planted faults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.errors import LLM2CLIPError, SourceError, UsageError
from llm2clip.eval import run
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.named import Named, card_of
from llm2clip.eval.run import evaluate
from tests.eval.lookalikes import (
    Numbered,
    captions_of,
    coco_json,
    expected,
    image,
    number_in,
    write,
    write_tar,
    write_zip,
)


def scores(name: str, root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The report of a benchmark, scored with the encoder of numbered images."""
    monkeypatch.setattr(run, "open_encoder", lambda config: (Numbered(), {"encoder": "numbered"}))
    return evaluate(EvaluateConfig(model="numbered", benchmark=(name,), root=str(root), out=out, baseline="none"))


def same(metrics: dict[str, float], captions: Sequence[Sequence[str]], prefix: str) -> None:
    """Check that the recalls of a report are those of plain numpy."""
    wanted = {f"{prefix}/{key}": value for key, value in expected(captions).items()}
    assert {key: metrics[key] for key in wanted} == pytest.approx(wanted, abs=1e-9)


def is_read(named: Named, captions: Sequence[Sequence[str]]) -> None:
    """Check that every image has its own captions, and that the images are the right ones."""
    found = {number_in(sample.image): list(sample.captions[""]) for sample in named}
    assert found == dict(enumerate(map(list, captions)))


COCO = captions_of(5000, 25_010)
COCO_NAMES = [f"COCO_val2014_{3 * i + 42:012d}.jpg" for i in range(5000)]


def coco_list(captions: Sequence[Sequence[str]] = COCO) -> str:
    return json.dumps([{"image": f"val2014/{n}", "caption": own} for n, own in zip(COCO_NAMES, captions, strict=False)])


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds COCO under its name, images in a zip."""
    root = tmp_path_factory.mktemp("benchmarks")
    zipped = {f"val2014/{name}": image(number) for number, name in enumerate(COCO_NAMES)}
    write_zip(root / "coco-karpathy" / "val2014.zip", zipped)
    write(root / "coco-karpathy", {"coco_karpathy_test.json": coco_list()})
    return root


@pytest.mark.ci
def test_coco_scores_are_those_of_plain_numpy(coco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = scores("coco-karpathy", coco_root, tmp_path / "report", monkeypatch)
    metrics = report["metrics"]
    same(metrics, COCO, "coco-karpathy")
    assert 0.05 < metrics["coco-karpathy/i2t_r@1"] < 0.95
    more = {f"coco-karpathy/{way}_{what}@10" for way in ("i2t", "t2i") for what in ("map", "ndcg")}
    more |= {"coco-karpathy/cra", "coco-karpathy/cra_second"}
    assert set(metrics) == {*more, *(f"coco-karpathy/{key}" for key in expected(COCO[:2]))}
    protocol = report["protocol"]["coco-karpathy"]
    assert protocol["images"] == 5000 and protocol["captions"] == 25_010 and not protocol["not_checked"]
    assert report["intervals"].keys() == report["metrics"].keys()
    page = (tmp_path / "report" / "report.md").read_text()
    assert f"| SigLIP2 SO/14 + LLM2CLIP-60M 224 | 73.7 ({100 * metrics['coco-karpathy/i2t_r@1'] - 73.7:+.1f}) |" in page
    assert "a tie counts against the model" in page


def test_coco_in_its_other_forms(coco_root: Path, tmp_path: Path) -> None:
    write(tmp_path, {"coco_test_karpathy.json": coco_json(COCO_NAMES, COCO)})
    (tmp_path / "val2014.zip").symlink_to(coco_root / "coco-karpathy" / "val2014.zip")
    is_read(Named("coco-karpathy", tmp_path), COCO)
    for shard in range(2):
        files = {}
        for number in range(2500 * shard, 2500 * shard + 2500):
            files |= {f"s{number:07d}.jpg": image(number), f"s{number:07d}.txt": "\n".join(COCO[number])}
        write_tar(tmp_path / "wds" / "test" / f"{shard}.tar", files)
    is_read(Named("coco-karpathy", tmp_path / "wds"), COCO)


@pytest.mark.slow
def test_the_names_of_coco_need_no_images_for_a_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Texts:
        encode_text = Numbered.encode_text

    write(tmp_path, {"coco_karpathy_test.json": coco_list()})
    monkeypatch.setattr(run, "open_encoder", lambda config: (Texts(), {"encoder": "text encoder"}))
    config = EvaluateConfig(teacher="t", benchmark=("coco-karpathy",), root=str(tmp_path), out=tmp_path / "report")
    assert set(evaluate(config)["metrics"]) == {"coco-karpathy/cra", "coco-karpathy/cra_second"}


def fault(name: str, root: Path) -> str:
    with pytest.raises(LLM2CLIPError) as caught:
        Named(name, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_the_protocols_is_no_score(coco_root: Path, tmp_path: Path) -> None:
    assert "lacks its files; it takes coco_karpathy_test.json" in fault("coco-karpathy", tmp_path)
    (tmp_path / "val2014.zip").symlink_to(coco_root / "coco-karpathy" / "val2014.zip")
    for captions, told in (
        (COCO[:-1], "coco_karpathy_test.json gives 4,999 images, the protocol has 5,000"),
        ([own[:5] for own in COCO], "gives 25,000 captions, the protocol has 25,010; it is another file"),
        ([[" "], *COCO[1:]], "coco_karpathy_test.json row 1 holds an empty caption"),
        ([[], *COCO[1:]], "coco_karpathy_test.json row 1 holds no image with captions"),
    ):
        write(tmp_path, {"coco_karpathy_test.json": coco_list(captions)})
        assert told in fault("coco-karpathy", tmp_path)
    write(tmp_path, {"coco_karpathy_test.json": coco_list()[:-30]})
    assert "coco_karpathy_test.json is damaged JSON" in fault("coco-karpathy", tmp_path)
    twice = coco_list().replace(COCO_NAMES[1], COCO_NAMES[0])
    write(tmp_path, {"coco_karpathy_test.json": twice})
    assert f"image val2014/{COCO_NAMES[0]} stands in several rows" in fault("coco-karpathy", tmp_path)
    write(tmp_path, {"coco_karpathy_test.json": coco_list().replace(COCO_NAMES[7], "COCO_val2014_no.jpg")})
    assert (
        "image val2014/COCO_val2014_no.jpg (coco_karpathy_test.json row 8) is missing, and 0 more of 5,000; looked in"
        in fault("coco-karpathy", tmp_path)
    )


FLICKR = captions_of(1000, 5000, word="two men, and a dog")
FLICKR_NAMES = [f"{1_000_092 + 17 * i}.jpg" for i in range(1000)]


def flickr_images() -> dict[str, bytes]:
    return {f"flickr30k-images/{name}": image(number) for number, name in enumerate(FLICKR_NAMES)}


@pytest.fixture(scope="module")
def flickr_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write(tmp_path_factory.mktemp("flickr30k"), flickr_images())
    rows = [{"image": f"flickr30k-images/{n}", "caption": own} for n, own in zip(FLICKR_NAMES, FLICKR, strict=True)]
    return write(root, {"flickr30k_test.json": json.dumps(rows)})


def test_flickr_scores_are_those_of_plain_numpy(
    flickr_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = scores("flickr30k", flickr_root, tmp_path / "report", monkeypatch)
    same(report["metrics"], FLICKR, "flickr30k")


def csv_cell(texts: Sequence[str]) -> str:
    return '"' + json.dumps(texts).replace('"', '""') + '"'


def test_flickr_in_its_other_forms(flickr_root: Path, tmp_path: Path) -> None:
    pairs = [(name, text) for name, own in zip(FLICKR_NAMES, FLICKR, strict=True) for text in own]
    token = [f"{name}#{i % 5}\t{text}" for i, (name, text) in enumerate(pairs)] + ["77.jpg#0\tanother split"]
    table = [f"{csv_cell(own)},test,{name}" for name, own in zip(FLICKR_NAMES, FLICKR, strict=True)]
    forms = {
        "listed": {"flickr30k_test_karpathy.txt": "image,caption\n" + "\n".join(f"{n},{t}" for n, t in pairs)},
        "crlf": {"flickr30k_test_karpathy.txt": "image,caption\r\n" + "\r\n".join(f"{n},{t}" for n, t in pairs)},
        "csv": {"flickr_annotations_30k.csv": "raw,split,filename\n" + "\n".join([*table, '"[""x""]",val,77.jpg'])},
        "token": {"results_20130124.token": "\n".join(token), "test.txt": "\n".join(n[:-4] for n in FLICKR_NAMES)},
    }
    for form, files in forms.items():
        write(tmp_path / form, files)
        (tmp_path / form / "flickr30k-images").symlink_to(flickr_root / "flickr30k-images")
        is_read(Named("flickr30k", tmp_path / form), FLICKR)
    (tmp_path / "token" / "test.txt").unlink()
    assert "results_20130124.token holds 1,001 images and not which are the test split" in fault(
        "flickr30k", tmp_path / "token"
    )
    (tmp_path / "parquet").mkdir()
    cells = [{"bytes": image(number), "path": name} for number, name in enumerate(FLICKR_NAMES)]
    columns = {"image": [*cells, cells[0]], "caption": [*FLICKR, FLICKR[0]], "split": ["test"] * 1000 + ["val"]}
    pq.write_table(pa.table(columns), tmp_path / "parquet" / "0.parquet", row_group_size=100)
    is_read(Named("flickr30k", tmp_path / "parquet"), FLICKR)


def test_an_image_that_cannot_be_read_ends_the_score(
    flickr_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {**flickr_images(), f"flickr30k-images/{FLICKR_NAMES[9]}": image(9)[:40]})
    (tmp_path / "flickr30k_test.json").symlink_to(flickr_root / "flickr30k_test.json")
    with pytest.raises(SourceError, match=r"flickr30k: flickr30k-images/1000245.jpg: not an image"):
        scores("flickr30k", tmp_path, tmp_path / "report", monkeypatch)


URBAN = captions_of(1000, 1000, word="a street")


def urban_files(captions: Sequence[Sequence[str]] = URBAN) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {}
    for number, (text,) in enumerate(captions):
        files |= {f"Urban1k/image/{number + 1}.jpg": image(number), f"Urban1k/caption/{number + 1}.txt": text}
    return files


def test_urban_scores_are_those_of_plain_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = urban_files()
    files["Urban1k/caption/8.txt"] = f"{URBAN[7][0]}\r\nanother line #3\r\n"
    write_zip(tmp_path / "Urban1k.zip", {**files, "__MACOSX/Urban1k/caption/._1.txt": "junk"})
    report = scores("urban1k", tmp_path, tmp_path / "report", monkeypatch)
    same(report["metrics"], URBAN, "urban1k")
    assert report["protocol"]["urban1k"]["found"] == ["1 of 1,000 files have more than one line; only the first counts"]
    assert "1 of 1,000 files have more than one line" in (tmp_path / "report" / "report.md").read_text()
    assert scores("urban1k", tmp_path, tmp_path / "report", monkeypatch) == report  # which is not made again
    write_zip(tmp_path / "Urban1k.zip", {**files, "Urban1k/caption/8.txt": "another"})
    with pytest.raises(UsageError, match="urban1k has changed since"):
        scores("urban1k", tmp_path, tmp_path / "report", monkeypatch)


def test_urban_in_its_other_forms_and_with_a_gap(tmp_path: Path) -> None:
    write(tmp_path / "loose", urban_files())  # a thousand images loose
    is_read(Named("urban1k", tmp_path / "loose"), URBAN)
    rows = [{"image_id": i, "image": f"{i + 1}.jpg", "caption": URBAN[i][0]} for i in range(1000)]
    write(tmp_path / "flair", {"annotations/annotations.json": json.dumps({"annotations": rows})})
    (tmp_path / "flair" / "image").symlink_to(tmp_path / "loose" / "Urban1k" / "image")
    is_read(Named("urban1k", tmp_path / "flair"), URBAN)
    (tmp_path / "loose" / "Urban1k" / "caption" / "77.txt").unlink()
    assert fault("urban1k", tmp_path / "loose") == "urban1k: caption/77.txt is missing"
    write(tmp_path / "loose", {"Urban1k/caption/1001.txt": "x", "Urban1k/caption/77.txt": "x"})
    assert fault("urban1k", tmp_path / "loose") == "urban1k: caption/1001.txt is none of 1.txt to 1000.txt"


def test_they_are_listed_with_their_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(EvaluateConfig(list=True)) == {}
    assert "urban1k " in capsys.readouterr().out
    evaluate(EvaluateConfig(list=True, benchmark=("flickr30k",)))
    card = capsys.readouterr().out
    assert "captions  5,000; 5 an image" in card and "published 93.9 / 82.9  SigLIP2 SO/14 224" in card


def test_wrong_use_of_benchmarks_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"benchmark 'urban-1k' is unknown \(did you mean 'urban1k'\?\)"):
        EvaluateConfig(benchmark=("urban-1k",), model="m", root="r", out=tmp_path)
    with pytest.raises(UsageError, match="benchmark urban1k takes root='DIR'"):
        EvaluateConfig(benchmark=("urban1k",), model="m", out=tmp_path)
    with pytest.raises(UsageError, match="there is no out='DIR'"):
        EvaluateConfig(benchmark=("urban1k",), model="m", root="r")
    with pytest.raises(UsageError, match="nothing to score on"):
        EvaluateConfig(model="m", out=tmp_path)
    with pytest.raises(UsageError, match="root nowhere is no folder"):
        Named("urban1k", "nowhere")


def test_every_card_says_what_must_be_known() -> None:
    from llm2clip.eval import benchmarks
    from llm2clip.parts import part_names

    for name in part_names(benchmarks):
        told = card_of(name).told()
        assert all(told[what] for what in ("title", "split", "per_image", "text", "source", "licence", "fetch", "ties"))
