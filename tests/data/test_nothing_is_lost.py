"""No caption, row or image of a source is lost, doubled or taken for another without a word."""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.data.source import Source
from llm2clip.errors import LLM2CLIPError, SourceError, UsageError

Open = Callable[..., Source]
Make = Callable[..., bytes]
MakeTar = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, make_image: Make) -> Path:
    for i, name in enumerate("abc"):
        (tmp_path / f"{name}.jpg").write_bytes(make_image(colour=(60 * i, 10, 10)))
    return tmp_path


def captions(source: Source, kind: str = "raw") -> dict[str, tuple[str, ...]]:
    return {sample.id: sample.captions.get(kind, ()) for sample in source}


# ------------------------------------------------------------------- columns and captions


@pytest.mark.parametrize("header", ["image,caption,caption,caption", "image,caption, caption ,caption"])
def test_columns_of_one_name_all_count(folder: Path, source_of: Open, header: str) -> None:
    lines = [header, "a.jpg,one cat,two cats,three cats", "b.jpg,one dog,,two dogs"]
    (folder / "t.csv").write_text("\n".join(lines))
    by_hand = {row[0]: tuple(filter(None, row[1:])) for row in csv.reader(lines[1:])}
    assert captions(source_of(folder / "t.csv")) == by_hand
    assert captions(source_of(folder / "t.csv", captions={"x": "caption"}), "x") == by_hand


def test_keys_of_one_name_all_count(folder: Path, source_of: Open, make_tar: MakeTar) -> None:
    text = '{"image": "a.jpg", "caption": "one cat", "caption": "two cats"}'
    (folder / "t.jsonl").write_text(text)
    (folder / "t.json").write_text(f"[{text}]")
    make_tar(folder / "t.tar", {"k.jpg": (folder / "a.jpg").read_bytes(), "k.json": text})
    for name in ("t.jsonl", "t.json", "t.tar"):
        assert list(captions(source_of(folder / name)).values()) == [("one cat", "two cats")], name


def test_an_image_column_that_comes_twice_gives_its_first_cell(folder: Path, source_of: Open) -> None:
    (folder / "t.csv").write_text("image,image,caption\na.jpg,b.jpg,a cat\n")
    assert captions(source_of(folder / "t.csv")) == {"a.jpg": ("a cat",)}


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_typed_table_with_columns_of_one_name_is_refused(folder: Path, source_of: Open, ending: str) -> None:
    cells = [pa.array(["a.jpg"]), pa.array(["one"]), pa.array(["two"])]
    table = pa.Table.from_arrays(cells, names=["image", "caption", "caption"])
    if ending == "parquet":
        pq.write_table(table, folder / "t.parquet")
    else:
        with pa.ipc.new_stream(folder / "t.arrow", table.schema) as file:
            file.write_table(table)
    with pytest.raises(UsageError, match="several columns called 'caption'; rename them"):
        source_of(folder / f"t.{ending}")


def test_a_text_with_a_caption_a_line(
    folder: Path, source_of: Open, make_tar: MakeTar, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f"caption {i}" for i in range(5)]
    paragraphs = "A cat.\n\nIt is grey."
    for name, text in (("a", "\n".join(lines)), ("b", paragraphs), ("c", "a\r\nb\r\n")):
        (folder / f"{name}.txt").write_bytes(text.encode())
    make_tar(folder / "t.tar", {file.name: file.read_bytes() for file in sorted(folder.glob("[abc].*"))})
    expected = {"a": tuple(lines), "b": (paragraphs,), "c": ("a", "b")}
    with caplog.at_level(logging.INFO, logger="llm2clip"):
        assert captions(source_of(folder / "t.tar")) == expected
    told = [record.message for record in caplog.records[1:]]
    assert told == [
        "a: its txt has 5 lines, read as as many captions; where a text is one caption, say so by text_lines='one'"
    ]
    whole = {"a": ("\n".join(lines),), "b": (paragraphs,), "c": ("a\r\nb",)}
    assert captions(source_of(folder / "t.tar", text_lines="one")) == whole
    (folder / "t.tar").unlink()
    assert captions(source_of(folder)) == expected
    with pytest.raises(UsageError, match="did you mean 'one'"):
        source_of(folder, text_lines="ones")


@pytest.mark.parametrize(
    "text",
    ["\u200b", "\ufeff", "\u2060\u200d", "\u00ad", "\u3000", "\u2800", "\u3164", "\ufe0f", "\x00", "\u034f\u200e"],
)
def test_what_nobody_can_see_is_no_caption(folder: Path, source_of: Open, text: str) -> None:
    (folder / "t.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": [text, "a cat"]}))
    source = source_of(folder / "t.jsonl")
    assert captions(source) == {"a.jpg": ("a cat",)}
    assert source.bad.counts == {"empty caption": 1}


@pytest.mark.parametrize("text", ["!", "猫", "🐈", "e\u0301", "\u200fقطة", "\u0e41"])
def test_what_leaves_ink_is_a_caption(folder: Path, source_of: Open, text: str) -> None:
    (folder / "t.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": text}))
    assert captions(source_of(folder / "t.jsonl")) == {"a.jpg": (text,)}


# ------------------------------------------------------------------- members of tars, files of folders


@pytest.mark.parametrize("place", ["tar", "folder"])
def test_names_with_dots(tmp_path: Path, jpeg: bytes, source_of: Open, make_tar: MakeTar, place: str) -> None:
    files: dict[str, bytes | str] = {}
    for day in ("05.01", "05.02"):
        files |= {
            f"IMG.{day}.jpg": jpeg,
            f"IMG.{day}.json": json.dumps({"caption": day}),
            f"IMG.{day}.short.txt": f"s{day}",
        }
    files |= {"0001.image.jpg": jpeg, "0001.txt": "webdataset's own rule"}
    if place == "tar":
        source = source_of(make_tar(tmp_path / "t.tar", files))
    else:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        source = source_of(tmp_path)
    found = {sample.id: dict(sample.captions) for sample in source}
    assert found == {
        "IMG.05.01": {"raw": ("05.01",), "short": ("s05.01",)},
        "IMG.05.02": {"raw": ("05.02",), "short": ("s05.02",)},
        "0001": {"raw": ("webdataset's own rule",)},
    }
    assert source.bad.counts == {}


def test_a_text_of_several_images_is_of_each(tmp_path: Path, jpeg: bytes, source_of: Open, make_tar: MakeTar) -> None:
    files = {"k.a.jpg": jpeg, "k.a.txt": "left", "k.b.jpg": jpeg, "k.b.txt": "right", "k.long.txt": "both of them"}
    found = {s.id: dict(s.captions) for s in source_of(make_tar(tmp_path / "t.tar", files))}
    assert found == {
        "k.a": {"raw": ("left",), "long": ("both of them",)},
        "k.b": {"raw": ("right",), "long": ("both of them",)},
    }


def test_images_that_end_in_no_sample_are_counted(
    tmp_path: Path, jpeg: bytes, source_of: Open, make_tar: MakeTar
) -> None:
    files = {"k.left.jpg": jpeg, "k.right.jpg": jpeg, "k.txt": "one text for two", "lone.jpg": jpeg}
    source = source_of(make_tar(tmp_path / "t.tar", files))
    assert [sample.id for sample in source] == ["k"]
    assert source.bad.counts == {"image not used": 1, "no caption": 1}
    chosen = source_of(tmp_path / "t.tar", image="right.jpg")
    offsets = [next(iter(opened)).image.offset for opened in (source, chosen)]
    assert offsets[0] < offsets[1]
    assert "image not used" not in chosen.bad.counts


def test_a_cut_off_member_takes_its_own_sample_alone(
    tmp_path: Path, make_image: Make, source_of: Open, make_tar: MakeTar
) -> None:
    large = make_image((400, 300))
    files = {
        f"IMG.{i}.{ending}": large if ending == "jpg" else f"text {i}" for i in (1, 2, 3) for ending in ("txt", "jpg")
    }
    whole = make_tar(tmp_path / "t.tar", files).read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[: whole.rindex(b"IMG.3.jpg") + 700])
    source = source_of(tmp_path / "t.tar")
    assert captions(source) == {"IMG.1": ("text 1",), "IMG.2": ("text 2",)}
    assert source.bad.counts == {"truncated tar": 1}


def test_texts_without_an_image_are_counted(folder: Path, source_of: Open) -> None:
    (folder / "a.txt").write_text("a cat")
    (folder / "d.txt").write_text("whose image is missing")
    source = source_of(folder)
    assert captions(source) == {"a": ("a cat",)}
    assert source.bad.counts == {"no caption": 2, "text without an image": 1}
    for image in folder.glob("*.jpg"):
        image.unlink()
    with pytest.raises(UsageError, match="holds texts and no images beside them"):
        source_of(folder)


# ------------------------------------------------------------------- what is data, and what is not


def test_a_saved_dataset_is_what_its_state_names(tmp_path: Path, jpeg: bytes, source_of: Open) -> None:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": jpeg + bytes([i]), "path": None} for i in range(4)], "caption": list("abcd")}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "ds")
    loaded = datasets.load_from_disk(tmp_path / "ds")
    loaded.map(lambda row: {"caption": row["caption"].upper()})
    loaded.shuffle(seed=0)
    assert len(list((tmp_path / "ds").glob("*.arrow"))) > 1
    assert [s.captions["raw"] for s in source_of(tmp_path / "ds")] == [("a",), ("b",), ("c",), ("d",)]
    datasets.DatasetDict({"train": made.select([0]), "test": made.select([1, 2])}).save_to_disk(tmp_path / "both")
    assert len(list(source_of(tmp_path / "both"))) == 1
    assert [s.captions["raw"] for s in source_of(tmp_path / "both", split="test")] == [("b",), ("c",)]
    with pytest.raises(UsageError, match="has no split 'val'; it has test, train"):
        source_of(tmp_path / "both", split="val")
    (tmp_path / "ds" / "state.json").write_text("{}")
    with pytest.raises(SourceError, match=r"state\.json names no data files"):
        source_of(tmp_path / "ds")


def test_an_output_below_a_source_is_no_part_of_it(folder: Path, source_of: Open) -> None:
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)
    before = source_of(folder)
    output = folder / "bank"
    output.mkdir()
    (output / "run.json").write_text(json.dumps({"kind": "bank", "config": {}}))
    (output / "samples.json").write_text("{}")
    (output / "more").mkdir()
    (output / "more" / "0.csv").write_text("image,caption\nx.jpg,x\n")
    assert source_of(folder).fingerprint == before.fingerprint
    assert captions(source_of(folder)) == {name: (name,) for name in "abc"}
    (folder / "t.csv").write_text("image,caption\na.jpg,a cat\n")
    assert captions(source_of(folder / "**" / "*.csv")) == {"a.jpg": ("a cat",)}
    assert captions(source_of(output / "more" / "*.csv", images=False)) == {"x.jpg": ("x",)}, "named, it is meant"
    (output / "run.json").write_text(json.dumps({"epochs": 3}))  # another program's
    assert source_of(folder).fingerprint != before.fingerprint


def test_splits_in_folders(tmp_path: Path, jpeg: bytes, source_of: Open) -> None:
    for split, names in (("train", "ab"), ("test", "c")):
        (tmp_path / split).mkdir()
        rows = [f"{name}.jpg,{name}" for name in names]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
        for name in names:
            (tmp_path / split / f"{name}.jpg").write_bytes(jpeg)
    with pytest.raises(UsageError, match="holds the splits test, train; name one by split='NAME'"):
        source_of(tmp_path)
    assert captions(source_of(tmp_path, split="test")) == {"c.jpg": ("c",)}
    assert captions(source_of(tmp_path / "train")) == {"a.jpg": ("a",), "b.jpg": ("b",)}


def test_splits_in_a_column(folder: Path, source_of: Open, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "t.csv").write_text("image,caption,split\na.jpg,a,train\nb.jpg,b,test\nc.jpg,c,train\na.jpg,a too,test\n")
    with caplog.at_level(logging.INFO, logger="llm2clip"):
        assert len(list(source_of(folder / "t.csv"))) == 3
    assert "all rows were read, 2 train, 2 test; split='NAME' takes one split" in caplog.text
    train = source_of(folder / "t.csv", split="train")
    assert captions(train) == {"a.jpg": ("a",), "c.jpg": ("c",)}, "the other split's captions of an image stay out"
    assert train.fingerprint != source_of(folder / "t.csv").fingerprint
    with caplog.at_level(logging.INFO, logger="llm2clip"), pytest.raises(SourceError, match="no usable samples in t"):
        list(source_of(folder / "t.csv", split="val"))
    assert "has no rows whose split is 'val'" in caplog.text
    (folder / "v.csv").write_text("image,caption,split\na.jpg,a,val\n")
    assert captions(source_of(folder / "t.csv", folder / "v.csv", split="val")) == {"v/a.jpg": ("a",)}
    (folder / "u.csv").write_text("image,caption\na.jpg,a\n")
    with pytest.raises(UsageError, match=r"no column 'split' \(split='val'\)"):
        source_of(folder / "u.csv", split="val")


def test_a_split_of_what_has_none_is_refused(folder: Path, source_of: Open, make_tar: MakeTar, jpeg: bytes) -> None:
    (folder / "a.txt").write_text("a")
    with pytest.raises(UsageError, match="holds no splits; leave split='train' out"):
        source_of(folder, split="train")
    with pytest.raises(UsageError, match="is read whole; leave split='train' out"):
        source_of(make_tar(folder / "t.tar", {"k.jpg": jpeg, "k.txt": "k"}), split="train")


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("columns", [("filepath", "filename"), ("path", "file_name"), ("file_path", "file")])
def test_a_folder_and_a_name_in_two_columns(
    tmp_path: Path, jpeg: bytes, source_of: Open, columns: tuple[str, str], images: bool
) -> None:
    (tmp_path / "val2014").mkdir()
    rows = []
    for i in range(3):
        (tmp_path / "val2014" / f"{i}.jpg").write_bytes(jpeg)
        sentences = [{"raw": f"a cat {i}", "tokens": ["a", "cat"]}, {"raw": f"the cat {i}"}]
        rows.append({columns[0]: "val2014", columns[1]: f"{i}.jpg", "sentences": sentences})
    (tmp_path / "k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = captions(source_of(tmp_path / "k.jsonl", images=images))
    assert found == {f"val2014/{i}.jpg": (f"a cat {i}", f"the cat {i}") for i in range(3)}


def test_a_name_beside_a_folder_of_another_use_stands_alone(folder: Path, source_of: Open) -> None:
    (folder / "t.csv").write_text("path,file_name,caption\nexports of May,a.jpg,a cat\n")
    assert captions(source_of(folder / "t.csv")) == {"a.jpg": ("a cat",)}
    (folder / "u.csv").write_text("image,file_name,caption\na,b.jpg,a cat\n")
    (folder / "a").write_bytes((folder / "a.jpg").read_bytes())
    assert captions(source_of(folder / "u.csv", image="image")) == {"a": ("a cat",)}, "named, it is meant"


# ------------------------------------------------------------------- one image is one sample


def test_one_image_however_it_is_spelt(folder: Path, source_of: Open) -> None:
    (folder / "sub").mkdir()
    names = ["a.jpg", "./a.jpg", "sub/../a.jpg", str(folder / "a.jpg"), ".//a.jpg"]
    rows = [f"{name},caption {i}" for i, name in enumerate(names)]
    (folder / "t.csv").write_text("\n".join(["image,caption", *rows, "b.jpg,another"]))
    found = captions(source_of(folder / "t.csv"))
    assert sorted(found.values()) == [("another",), tuple(f"caption {i}" for i in range(5))]
    cells = [{"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": cells, "caption": list("vwxyz")}), folder / "t.parquet")
    assert list(captions(source_of(folder / "t.parquet")).values()) == [tuple("vwxyz")]


@pytest.mark.parametrize("struct", [True, False])
def test_the_same_bytes_in_several_rows_are_one_image(
    tmp_path: Path, make_image: Make, source_of: Open, struct: bool
) -> None:
    images = [make_image(colour=(50 * i, 0, 0)) for i in range(3)]
    order = [0, 0, 1, 2, 0, 2]
    cells = [{"bytes": images[i], "path": f"{n}.jpg"} if struct else images[i] for n, i in enumerate(order)]
    pq.write_table(
        pa.table({"image": cells, "caption": [f"{i} in row {n}" for n, i in enumerate(order)]}), tmp_path / "t.parquet"
    )
    found = list(source_of(tmp_path / "t.parquet"))
    expected = {i: tuple(f"{i} in row {n}" for n, j in enumerate(order) if i == j) for i in range(3)}
    assert sorted(sample.captions["raw"] for sample in found) == sorted(expected.values())
    assert len({sample.image for sample in found}) == 3


def test_one_image_in_all_rows_stands_in_for_none(tmp_path: Path, jpeg: bytes, source_of: Open) -> None:
    pq.write_table(pa.table({"image": [jpeg] * 3, "caption": list("abc")}), tmp_path / "t.parquet")
    assert [sample.captions["raw"] for sample in source_of(tmp_path / "t.parquet")] == [("a",), ("b",), ("c",)]


# ------------------------------------------------------------------- refusals that help


def test_images_as_text_are_refused_in_a_short_line(folder: Path, make_image: Make, source_of: Open) -> None:
    import numpy as np
    from PIL import Image

    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(noise, "JPEG")
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        for data in (make_image((40, 40), form=form), noise.getvalue()):
            text = base64.b64encode(data).decode()
            for cell in (text, f"data:image/x;base64,{text}"):
                (folder / "t.jsonl").write_text(json.dumps({"image": cell, "caption": "noise"}))
                with pytest.raises(UsageError, match="base64 as it seems") as caught:
                    source_of(folder / "t.jsonl")
                assert len(str(caught.value)) < 500, form


def test_no_message_quotes_a_novel(folder: Path, source_of: Open) -> None:
    novel = "word " * 20_000
    rows = [{"image": novel, "caption": "a"}, {"image": "a.jpg", "caption": {"text": [novel, 3]}}, [novel], "..", {}]
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + f'\n{{"image": "{novel}\n')
    source = source_of(folder / "t.jsonl")
    list(source)
    assert source.bad.counts
    said = [example for examples in source.bad.examples.values() for example in examples]
    assert max(map(len, said)) < 1500
    (folder / "u.jsonl").write_text(json.dumps({"image": f"/{novel}", "caption": "a"}))
    with pytest.raises(LLM2CLIPError) as caught:
        list(source_of(folder / "u.jsonl"))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "\nimage,caption\na.jpg,a cat\n",
        "\r\n \r\nimage,caption\r\na.jpg,a cat\r\n",
        "sep=;\nimage;caption\na.jpg;a cat\n",
        "\ufeffsep=\t\nimage\tcaption\na.jpg\ta cat\n",
        "\n\nSEP=|\n\nimage|caption\na.jpg|a cat\n",
        '"image","caption"\n"a.jpg","a cat"\n',
    ],
)
def test_what_stands_before_a_header(folder: Path, source_of: Open, text: str) -> None:
    (folder / "t.csv").write_text(text, encoding="utf-8", newline="")
    source = source_of(folder / "t.csv")
    assert captions(source) == {"a.jpg": ("a cat",)}
    assert source.bad.counts == {}


def test_a_header_over_two_lines(folder: Path, source_of: Open) -> None:
    (folder / "t.csv").write_text('image,"caption\n(English)",n\na.jpg,a cat,1\nb.jpg,"a\ndog",2\n')
    found = captions(source_of(folder / "t.csv", captions={"raw": "caption\n(English)"}))
    assert found == {"a.jpg": ("a cat",), "b.jpg": ("a\ndog",)}
    (folder / "u.csv").write_text('image,"caption\na.jpg,a cat\n')
    with pytest.raises(SourceError, match="the line that names its columns cannot be read"):
        source_of(folder / "u.csv")
