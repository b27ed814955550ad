"""Benchmarks of long captions and of languages in copies of their layouts with the real numbers of rows, and faults."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.errors import LLM2CLIPError, SourceError, UsageError
from llm2clip.eval import annotations
from llm2clip.eval.benchmarks import xm3600, xtd10
from llm2clip.eval.named import Named, card_of
from llm2clip.eval.writing import RANGES, WORDS, check_language
from tests.eval.lookalikes import captions_of, coco_json, expected, image, json_lines, write, write_tar, write_zip
from tests.eval.test_benchmarks import fault, is_read, same, scores

VAL = captions_of(5000, 25_014)
VAL_NAMES = [f"{3 * i + 42:012d}.jpg" for i in range(5000)]


def test_coco_val2017_takes_the_first_five(tmp_path: Path) -> None:
    write_zip(tmp_path / "val2017.zip", {f"val2017/{name}": image(i) for i, name in enumerate(VAL_NAMES)})
    write_zip(
        tmp_path / "annotations_trainval2017.zip",
        {"annotations/captions_train2017.json": "{}", "annotations/captions_val2017.json": coco_json(VAL_NAMES, VAL)},
    )
    is_read(Named("coco-val2017", tmp_path), [own[:5] for own in VAL])
    write(tmp_path, {"captions_val2017.json": coco_json(VAL_NAMES, [own[:4] for own in VAL])})
    assert "gives 20,000 captions, the protocol has 25,000" in fault("coco-val2017", tmp_path)


DOCCI = captions_of(5000, 5000, word="a long description.\nOf two lines")


def test_docci_is_its_test_split(tmp_path: Path) -> None:
    rows = [
        {"example_id": f"{split}_{i:05d}", "split": split, "image_file": f"{split}_{i:05d}.jpg", "description": text}
        for split, texts in (("train", ["x"] * 9647), ("test", [own[0] for own in DOCCI]), ("qual_dev", ["y"] * 100))
        for i, text in enumerate(texts)
    ]
    write_zip(tmp_path / "images.zip", {f"images/test_{i:05d}.jpg": image(i) for i in range(5000) if i != 41})
    write(tmp_path, {"images/test_00041.jpg": image(41)})
    write(tmp_path, {"docci_descriptions.jsonlines": json_lines(rows)})
    is_read(Named("docci", tmp_path), DOCCI)
    (tmp_path / "images" / "test_00041.jpg").unlink()
    write(tmp_path, {"docci_images.tar.gz": b"packed"})
    told = fault("docci", tmp_path)
    assert "image test_00041.jpg (docci_descriptions.jsonlines row 9689) is missing, and 0 more of 5,000" in told
    assert told.endswith("docci_images.tar.gz must be unpacked first")
    write(tmp_path, {"docci_descriptions.jsonlines": json_lines({**row, "split": "train"} for row in rows)})
    assert "gives 0 images, the protocol has 5,000 (test)" in fault("docci", tmp_path)


SHARED = captions_of(1000, 1000)


def test_sharegpt4v_reads_only_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is cut off soon after the first thousand rows, and never read to there."""
    monkeypatch.setattr(annotations, "READ_AT_ONCE", 4096)
    rows = [
        {
            "id": i,
            "image": f"sam/images/sa_{i}.jpg",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": own[0]}],
        }
        for i, own in enumerate([*SHARED, ["one more"]])
    ]
    file = "share-captioner_coco_lcs_sam_1246k_1107.json"
    write(tmp_path, {file: json.dumps(rows, indent=1)[:-3] + "!" * 10_000})
    write_tar(tmp_path / "sa_000000.tar", {f"./sa_{i}.jpg": image(i) for i in range(1000)})
    is_read(Named("sharegpt4v-1k", tmp_path), SHARED)
    write(tmp_path, {file: json.dumps(rows[:9])[:-20]})
    assert f"{file} is damaged or cut off" in fault("sharegpt4v-1k", tmp_path)
    write(tmp_path, {file: json.dumps(rows[:9])})
    assert "gives 9 images, the protocol has 1,000" in fault("sharegpt4v-1k", tmp_path)


@pytest.mark.slow
def test_dci_has_three_variants(tmp_path: Path) -> None:
    short, extra = captions_of(7805, 7805, word="short"), captions_of(7805, 7805, word="The Long One")
    for i in range(7805):
        one = {"image": f"sa_{i}.jpg", "short_caption": short[i][0], "extra_caption": extra[i][0] if i != 5 else ""}
        write(tmp_path, {f"annotations/{i:06d}.json": json.dumps(one)})
    write_tar(tmp_path / "sa_000138.tar", {f"sa_{i}.jpg": image(i) for i in range(7805)})
    joined = [[f"{a[0]}\n{b[0]}"] for a, b in zip(short, extra, strict=True)]
    joined[5] = short[5]
    is_read(Named("dci", tmp_path), joined)
    named = Named("dci-extra", tmp_path)
    assert len(named) == 7804 and named.told()["not_checked"] == ["images", "captions"]
    assert named.told()["found"] == ["1 of 7,805 images have no long caption and are left out"]
    assert {text for sample in named for text in sample.captions[""]} == {
        own[0].lower() for i, own in enumerate(extra) if i != 5
    }
    table = "".join(f'sa_{i}.jpg\t"{own[0]}, he said ""so"""\n' for i, own in enumerate(extra) if i != 5)
    write(tmp_path, {"dci_long.csv": f"filepath\ttitle\n{table}"})
    named = Named("dci-long", tmp_path)
    assert next(iter(named)).captions[""] == (f'{extra[0][0]}, he said "so"',) and len(named) == 7804
    (tmp_path / "annotations" / "000007.json").unlink()
    assert "gives 7,804 images, the protocol has 7,805" in fault("dci", tmp_path)


def test_iiw_pools_three_sets(tmp_path: Path) -> None:
    captions = captions_of(612, 612)
    sets = {"IIW-400": "aar_test_{}", "DCI_Test": "sa_{}.jpg", "DOCCI_Test": "test_{}"}
    number, files = 0, {}
    for (folder, form), count in zip(sets.items(), (400, 112, 100), strict=True):
        rows = []
        for _ in range(count):
            name = form.format(number)
            files[f"{name.removesuffix('.jpg')}.jpg"] = image(number)
            rows.append({"image/key" if folder == "IIW-400" else "image": name, "IIW": captions[number][0]})
            number += 1
        write(tmp_path, {f"datasets/{folder}/data.jsonl": json_lines(rows)})
    write_zip(tmp_path / "images.zip", files)
    is_read(Named("iiw", tmp_path), captions)
    (tmp_path / "datasets" / "DCI_Test" / "data.jsonl").unlink()
    assert "lacks DCI_Test/data.jsonl" in fault("iiw", tmp_path)


CN = captions_of(1000, 5000, word="一个 男人")


def test_flickr30k_cn_from_base64_and_from_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{i + 7}\t{base64.b64encode(image(i)).decode()}" for i in range(1000)]
    every = enumerate(text for own in CN for text in own)
    texts = [{"text_id": i, "text": text, "image_ids": [i // 5 + 7]} for i, text in every]
    write(tmp_path, {"test_imgs.tsv": "\r\n".join(lines), "test_texts.jsonl": json_lines(texts)})
    is_read(Named("flickr30k-cn", tmp_path), CN)
    same(scores("flickr30k-cn", tmp_path, tmp_path / "report", monkeypatch)["metrics"], CN, "flickr30k-cn")
    write(tmp_path, {"test_imgs.tsv": "\n".join(lines[1:])})
    assert "image 7 of test_imgs.tsv (test_texts.jsonl image 7) is missing, and 0 more" in fault(
        "flickr30k-cn", tmp_path
    )
    zipped = {f"flickr30k-images/{i + 7}.jpg": image(i) for i in range(1000)}
    line = "".join(f"{i + 7}.jpg#zh#{k}\t{text}\n" for i, own in enumerate(CN) for k, text in enumerate(own))
    write_zip(tmp_path / "lines" / "flickr30k-images.zip", zipped)
    write(tmp_path / "lines", {"flickr30k_cn_test.txt": line})
    is_read(Named("flickr30k-cn", tmp_path / "lines"), CN)
    tagged = "image,caption\n" + "".join(f"{i + 7}.jpg,一个:m 男人:n 站:v\n" for i in range(1000))
    write(tmp_path / "tagged", {"flickr30k_test_zh.txt": tagged})
    told = fault("flickr30k-cn", tmp_path / "tagged")
    assert told.startswith("flickr30k_test_zh.txt line 2: '一个:m 男人:n 站:v' carries parts of speech")


def test_coco_cn_has_two_variants(tmp_path: Path) -> None:
    written, translated = captions_of(1000, 1053, word="写"), captions_of(1000, 5000, word="译")
    names = [f"COCO_{'val' if i % 5 else 'train'}2014_{i:012d}" for i in range(1000)]
    inner = "coco-cn-version1805v1.1"
    files = {f"{inner}/coco-cn_test.txt": "\n".join(names)}
    for name, captions in (("human-written", written), ("manually-translated", translated)):
        lines = [f"{n}#{k}\t{text}" for n, own in zip(names, captions, strict=True) for k, text in enumerate(own)]
        files[f"{inner}/imageid.{name}-caption.txt"] = "\n".join(["COCO_val2014_999999999999#0\t训练", *lines])
    write(tmp_path, files)
    write_zip(tmp_path / "val2014.zip", {f"val2014/{n}.jpg": image(i) for i, n in enumerate(names) if i % 5})
    write_zip(tmp_path / "train2014.zip", {f"train2014/{n}.jpg": image(i) for i, n in enumerate(names) if not i % 5})
    is_read(Named("coco-cn", tmp_path), written)
    is_read(Named("coco-cn-translated", tmp_path), translated)
    (tmp_path / inner / "coco-cn_test.txt").write_text("\n".join(names[:-1]))
    assert "gives 999 images, the protocol has 1,000 (coco-cn_test.txt)" in fault("coco-cn", tmp_path)


def phrase(language: str) -> str:
    """Words that look like a language."""
    if language in WORDS:
        return WORDS[language]
    first = RANGES.get(language, "a-z").split("-")[0][-1]
    return "".join(chr(ord(first) + 40 + i) if language in RANGES else "grote fiets"[i % 11] for i in range(12))


def spoken(language: str, total: int, count: int) -> list[list[str]]:
    return captions_of(count, total, word=phrase(language))


XTD_NAMES = [f"COCO_{'val' if i % 5 == 0 else 'train'}2014_{i:012d}.jpg" for i in range(1000)]
XTD = {language: spoken(language, 1000, 1000) for language in xtd10.FOLDERS}


@pytest.fixture(scope="module")
def xtd_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("xtd10")
    write(root, {"XTD10/test_image_names.txt": "\n".join(XTD_NAMES) + "\n"})
    for language, captions in XTD.items():
        end = "\r\n" if xtd10.FOLDERS[language] == "XTD10" else "\n"
        lines = end.join(own[0] for own in captions)
        write(root, {f"{xtd10.FOLDERS[language]}/test_1kcaptions_{language}.txt": lines})
    write_zip(root / "coco.zip", {name: image(i) for i, name in enumerate(XTD_NAMES)})
    return root


def test_xtd10_is_scored_by_language_and_in_the_mean(
    xtd_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = scores("xtd10", xtd_root, tmp_path / "report", monkeypatch)
    for language, captions in XTD.items():
        same(report["metrics"], captions, f"xtd10/{language}")
    each = [expected(captions)["t2i_r@5"] for captions in XTD.values()]
    assert len(set(each)) > 5
    assert report["metrics"]["xtd10/t2i_r@5"] == pytest.approx(np.mean(each))
    low, high = report["intervals"]["xtd10/t2i_r@5"]
    assert low < np.mean(each) < high
    assert report["datasets"]["xtd10"]["median_rank"].keys() == {f"{n}/{way}" for n in XTD for way in ("i2t", "t2i")}
    page = (tmp_path / "report" / "report.md").read_text()
    assert page.count("captions that find their image first") == 1  # the verdict is of the mean
    row = [100 * report["metrics"][f"xtd10/jp/{way}_r@1"] for way in ("i2t", "t2i")]
    assert f"| jp | 1,000 | {row[0]:.1f} | {row[1]:.1f} |" in page and "| xtd10/jp" not in page
    bars = (tmp_path / "report" / "report.html").read_text().partition("by language, %.")[0]
    best = max(XTD, key=lambda language: report["metrics"][f"xtd10/{language}/t2i_r@1"])
    assert re.findall(r'text-anchor="end">(\w+)<', bars)[0] == best


def test_languages_that_are_exchanged_are_told(xtd_root: Path, tmp_path: Path) -> None:
    for one in xtd_root.iterdir():
        (tmp_path / one.name).symlink_to(one)
    files = {name: xtd10.FOLDERS[name] + f"/test_1kcaptions_{name}.txt" for name in ("de", "fr", "ko", "ru", "it")}
    text = {name: (xtd_root / place).read_text() for name, place in files.items()}
    for wrong, place, told in (
        (text["fr"], files["de"], r"MIC/test_1kcaptions_de.txt: what should be 'de' looks like 'fr'"),
        (text["ko"], files["ru"], r"XTD10/test_1kcaptions_ru.txt: '.*' is not written as 'ru' is"),
        (text["it"].rpartition("\n")[0], files["it"], "has 999 lines for 1,000 images"),
    ):
        folder = tmp_path / place.split("/")[0]
        if folder.is_symlink():
            folder.unlink()
            write(folder, {p.name: p.read_bytes() for p in (xtd_root / folder.name).iterdir()})
        before = (tmp_path / place).read_bytes()
        (tmp_path / place).write_text(wrong)
        with pytest.raises(SourceError, match=told):
            Named("xtd10", tmp_path)
        (tmp_path / place).write_bytes(before)
    assert len(Named("xtd10", tmp_path)) == 1000


def xm_rows(**changes: str) -> Iterator[dict[str, object]]:
    every = {name: spoken(changes.get(name, name), int(xm3600.COUNTS[name]), 3600) for name in xm3600.COUNTS}
    for i in range(3600):
        yield {
            "image/key": f"{i:016x}",
            **{name: {"caption": own[i], "caption/tokenized": []} for name, own in every.items()},
        }


@pytest.fixture(scope="module")
def xm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("xm3600")
    write_zip(root / "images.zip", {f"images/{i:016x}.jpg": image(i) for i in range(3600)})
    write_zip(root / "captions.zip", {"captions.jsonl": json_lines(xm_rows())})
    return root


def test_xm3600_is_read_with_all_captions_or_the_first(xm_root: Path) -> None:
    named = Named("xm3600", xm_root)
    assert sum(named.counts.values()) == 261_375 and len(named) == 3600
    assert {len(own) for sample in named.shown() for own in sample.captions.values()} == {2}
    assert set(Named("xm3600-first", xm_root, images=False).counts.values()) == {3600}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"fa": "ru"}, "is not written as 'fa' is"),
        pytest.param({"en": "de"}, "captions.jsonl: what should be 'en' looks like 'de'", marks=pytest.mark.slow),
    ],
)
def test_xm3600_columns_that_are_exchanged(files: dict[str, str], told: str, tmp_path: Path) -> None:
    write(tmp_path, {"captions.jsonl": json_lines(xm_rows(**files))})
    with pytest.raises(LLM2CLIPError, match=told):
        Named("xm3600", tmp_path, images=False)


@pytest.mark.slow
def test_xm3600_scores_and_its_parquet_mirror(xm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = scores("xm3600", xm_root, tmp_path / "report", monkeypatch)
    for language in ("bn", "mi", "zh"):
        same(report["metrics"], spoken(language, int(xm3600.COUNTS[language]), 3600), f"xm3600/{language}")
    rows = list(xm_rows())
    (tmp_path / "mirror" / "data").mkdir(parents=True)
    for language in xm3600.COUNTS:
        columns = {
            "image_id": [row["image/key"] for row in rows],
            "image": [{"bytes": image(i), "path": ""} for i in range(3600)],
            "captions": [row[language]["caption"] for row in rows],  # type: ignore[index]
        }
        pq.write_table(pa.table(columns), tmp_path / "mirror" / "data" / f"{language}-00000-of-00001.parquet")
    mirror = scores("xm3600", tmp_path / "mirror", tmp_path / "again", monkeypatch)
    assert mirror["metrics"] == report["metrics"]


def test_a_language_is_told_by_letters_and_common_words() -> None:
    check_language(["a dog on the street", "two cats with a ball"], "en", "here")
    check_language(["ein Hund auf der Straße"], "de", "here")
    check_language(["twee honden"], "nl", "here")
    with pytest.raises(SourceError, match="here: what should be 'en' looks like 'es'"):
        check_language(["un perro en el parque con una pelota"], "en", "here")
    with pytest.raises(SourceError, match="'two dogs' is not written as 'ja' is"):
        check_language(["two dogs"], "ja", "here")


def test_variants_read_one_folder(tmp_path: Path) -> None:
    """A folder of their own comes first; every benchmark that is made of another's card reads its files."""
    for name, whose in (("dci-extra", "dci"), ("dci-long", "dci"), ("coco-cn-translated", "coco-cn")):
        (tmp_path / whose).mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=re.escape(f"{name}: {tmp_path / whose} lacks")):
            Named(name, tmp_path)
    assert card_of("xm3600-first").variant_of == "xm3600"
    (tmp_path / "dci-long").mkdir()
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path / 'dci-long'} lacks")):
        Named("dci-long", tmp_path)
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path} lacks")):
        Named("docci", tmp_path)
