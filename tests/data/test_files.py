"""What a folder stands for, and images with texts beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llm2clip.data.images import load_image
from llm2clip.data.source import Source
from llm2clip.errors import UsageError

Open = Callable[..., Source]
Make = Callable[..., Path]


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(source: Source) -> dict[str, dict[str, tuple[str, ...]]]:
    return {sample.id: dict(sample.captions) for sample in source}


def test_images_with_texts_beside(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    put(
        tmp_path,
        {
            "a.jpg": jpeg,
            "a.txt": "one",
            "sub/b.v2.PNG": jpeg,
            "sub/b.v2.short.txt": "short",
            "sub/b.v2.long.txt": "long",
            "c.jpeg": jpeg,
            "c.json": json.dumps({"caption": ["x", "y"]}),
            "d.jpg": jpeg,
            "e.jpg": b"",
            "e.txt": "e",
            "a.pkl": b"never read",
            ".hidden/z.jpg": jpeg,
            "notes.txt": "belongs to no image",
        },
    )
    source = source_of(tmp_path)
    assert captions(source) == {
        "a": {"raw": ("one",)},
        "c": {"raw": ("x", "y")},
        "sub/b.v2": {"short": ("short",), "long": ("long",)},
    }
    assert source.bad.counts == {"no caption": 1, "empty image": 1, "text without an image": 1}
    assert [load_image(sample.image).size for sample in source] == [(12, 8)] * 3


def test_an_empty_text_is_an_empty_caption(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    source = source_of(put(tmp_path, {"a.jpg": jpeg, "a.txt": "", "b.jpg": jpeg, "b.txt": "b"}))
    assert list(captions(source)) == ["b"]
    assert source.bad.counts == {"empty caption": 1, "no caption": 1}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_image_folder_with_metadata(tmp_path: Path, source_of: Open, jpeg: bytes, name: str) -> None:
    table = "file_name,text\nx/0.jpg,zero\n" if name.endswith("csv") else '{"file_name": "x/0.jpg", "text": "zero"}'
    put(tmp_path, {"x/0.jpg": jpeg, name: table, "other.csv": "a,b\n"})
    assert captions(source_of(tmp_path)) == {"x/0.jpg": {"raw": ("zero",)}}


def test_img2dataset_shards(tmp_path: Path, source_of: Open, make_tar: Make, jpeg: bytes) -> None:
    for shard in ("00000", "00001"):
        make_tar(tmp_path / f"{shard}.tar", {f"{shard}0000.jpg": jpeg, f"{shard}0000.txt": shard})
        put(tmp_path, {f"{shard}.parquet": b"what was downloaded", f"{shard}_stats.json": "{}"})
    assert captions(source_of(tmp_path)) == {
        "00000/000000000": {"raw": ("00000",)},
        "00001/000010000": {"raw": ("00001",)},
    }


def test_img2dataset_plain_files(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    put(
        tmp_path,
        {"00000/000000000.jpg": jpeg, "00000/000000000.txt": "a", "00000.parquet": b"", "00000_stats.json": "{}"},
    )
    assert captions(source_of(tmp_path)) == {"00000/000000000": {"raw": ("a",)}}


def test_a_folder_with_one_table(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    put(tmp_path, {"images/0.jpg": jpeg, "captions.csv": "image,caption\nimages/0.jpg,zero\n"})
    assert captions(source_of(tmp_path)) == {"images/0.jpg": {"raw": ("zero",)}}
    put(tmp_path, {"more.csv": "image,caption\n"})
    with pytest.raises(UsageError, match=r"holds several tables \(captions\.csv, more\.csv\); name the one"):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "is an empty folder"),
        ({"a.md": "x"}, "holds no images, tars or tables"),
        ({"a.jpg": "x", "b.jpg": "x"}, "holds 2 images and no captions; put a .txt or .json"),
        ({"manifest.json": "{}", "run.json": "{}"}, "was made by llm2clip"),
        ({"dataset_dict.json": "{}", "a/state.json": "{}", "b/state.json": "{}"}, "holds the splits a, b; name one"),
    ],
)
def test_folders_that_are_no_source(tmp_path: Path, source_of: Open, files: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        source_of(put(tmp_path, dict(files)))
    assert complaint in str(caught.value)


def test_a_saved_dataset(tmp_path: Path, source_of: Open, make_image: Callable[..., bytes]) -> None:
    datasets = pytest.importorskip("datasets")
    encoded = [make_image((i + 3, 4)) for i in range(5)]
    records = {
        "image": [{"bytes": data, "path": None} for data in encoded],
        "caption": [[f"a{i}", f"b{i}"] for i in range(5)],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    dataset = datasets.Dataset.from_dict(records, features=features)
    dataset.shuffle(seed=1).save_to_disk(str(tmp_path / "one"), num_shards=2)
    samples = list(source_of(tmp_path / "one"))
    assert sorted(sample.captions["raw"] for sample in samples) == [(f"a{i}", f"b{i}") for i in range(5)]
    assert {s.captions["raw"][0]: load_image(s.image).width for s in samples} == {f"a{i}": i + 3 for i in range(5)}
    assert len({sample.id for sample in samples}) == 5
    datasets.DatasetDict({"test": dataset, "train": dataset}).save_to_disk(str(tmp_path / "splits"))
    assert len(list(source_of(tmp_path / "splits"))) == len(list(source_of(tmp_path / "splits" / "test"))) == 5


def test_unreadable_links_are_bad_samples(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    put(tmp_path, {"a.jpg": jpeg, "a.txt": "a", "b.txt": "b", "c.jpg": jpeg})
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "b.jpg")
    os.symlink(tmp_path / "nowhere.txt", tmp_path / "c.txt")
    source = source_of(tmp_path)
    assert list(captions(source)) == ["a"]
    assert source.bad.counts == {"missing file": 2, "no caption": 1}
