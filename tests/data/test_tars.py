"""Samples of tars: img2dataset's layout and its variations, damage, and tars behind URLs."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from llm2clip.data.bytes import read_bytes
from llm2clip.data.images import load_image
from llm2clip.data.sample import ImageRef
from llm2clip.data.source import Source
from llm2clip.errors import SourceError, TooManyBadSamples, UsageError

Make = Callable[..., Path]
Open = Callable[..., Source]


def captions(source: Source) -> dict[str, dict[str, tuple[str, ...]]]:
    return {sample.id: dict(sample.captions) for sample in source}


@pytest.fixture
def shard(tmp_path: Path, make_tar: Make, jpeg: bytes) -> Path:
    """Three samples as img2dataset writes them."""
    members: dict[str, bytes | str] = {}
    for i in range(3):
        record = {
            "caption": f"raw {i}",
            "short_caption": f"short {i}",
            "long_caption": [f"long {i}", "一只狗"],
            "width": 12,
        }
        members |= {f"{i:09d}.jpg": jpeg, f"{i:09d}.txt": f"raw {i}", f"{i:09d}.json": json.dumps(record)}
    return make_tar(tmp_path / "00000.tar", members)


def test_img2dataset_layout(shard: Path, source_of: Open, jpeg: bytes) -> None:
    source = source_of(shard)
    samples = list(source)
    assert [sample.id for sample in samples] == ["000000000", "000000001", "000000002"]
    assert samples[1].captions == {"raw": ("raw 1",), "short": ("short 1",), "long": ("long 1", "一只狗")}
    assert samples[1].image.path == str(shard)
    assert samples[1].image.length == len(jpeg)
    assert load_image(samples[1].image).size == (12, 8)
    assert source.bad.counts == {}


def test_named_columns(shard: Path, source_of: Open) -> None:
    assert captions(source_of(shard, captions={"dense": "long_caption"}, image="jpg"))["000000002"] == {
        "dense": ("long 2", "一只狗")
    }
    with pytest.raises(UsageError, match=r"no column 'short_captoin'.*did you mean 'short_caption'"):
        source_of(shard, captions={"short": "short_captoin"})
    assert [s.captions for s in source_of(shard, captions={"x": "txt"})] == [{"x": (f"raw {i}",)} for i in range(3)]


def test_missing_members_are_counted(tmp_path: Path, make_tar: Make, source_of: Open, jpeg: bytes) -> None:
    tar = make_tar(
        tmp_path / "a.tar",
        {
            "1.jpg": jpeg,
            "1.txt": "one",
            "2.jpg": jpeg,
            "3.txt": "three",
            "4.jpg": jpeg,
            "4.json": '{"caption": "four"}',
        },
    )
    source = source_of(tar)
    assert captions(source) == {"1": {"raw": ("one",)}, "4": {"raw": ("four",)}}
    assert source.bad.counts == {"no caption": 1, "no image": 1}
    assert source.bad.num_bad == 2


def test_cheap_defects_of_images_are_counted(tmp_path: Path, make_tar: Make, source_of: Open, jpeg: bytes) -> None:
    members: dict[str, bytes | str] = {"0.jpg": jpeg, "1.jpg": b"", "2.jpg": b"<html>", "3.JPG": jpeg, "4.bin": jpeg}
    members |= {f"{i}.txt": "a" for i in range(5)}
    source = source_of(make_tar(tmp_path / "a.tar", members))
    assert list(captions(source)) == ["0", "3", "4"]
    assert source.bad.counts == {"empty image": 1, "not an image": 1}


def test_captions_that_are_none(tmp_path: Path, make_tar: Make, source_of: Open, jpeg: bytes) -> None:
    texts = {
        "1.txt": " \n",
        "2.json": '{"caption": 7}',
        "3.json": "{broken",
        "4.json": "[1]",
        "5.txt": b"a\xe9",
        "6.txt": "ok",
    }
    members = {name: content for i in range(1, 7) for name, content in {f"{i}.jpg": jpeg, **_of(i, texts)}.items()}
    source = source_of(make_tar(tmp_path / "a.tar", members))
    assert captions(source) == {"6": {"raw": ("ok",)}}
    assert source.bad.counts == {
        "empty caption": 1,
        "caption not text": 1,
        "damaged JSON": 2,
        "caption not UTF-8": 1,
        "no caption": 5,
    }
    assert source.bad.num_bad == 5


def _of(i: int, texts: dict[str, bytes | str]) -> dict[str, bytes | str]:
    return {name: content for name, content in texts.items() if name.startswith(str(i))}


def test_texts_of_several_kinds_and_scattered_members(
    tmp_path: Path, make_tar: Make, source_of: Open, jpeg: bytes
) -> None:
    members = {
        "d/a.jpg": jpeg,
        "d/b.jpg": jpeg,
        "d/b.short.txt": "b",
        "d/a.long.txt": "\ufeffa " * 2,
        "d/a.caption_zh.txt": "狗",
    }
    assert captions(source_of(make_tar(tmp_path / "a.tar", members))) == {
        "d/a": {"long": ("a \ufeffa",), "zh": ("狗",)},
        "d/b": {"short": ("b",)},
    }


def test_a_member_that_comes_twice_counts_once(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.jpg", jpeg), ("1.txt", b"first"), ("1.txt", b"second")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = source_of(tmp_path / "a.tar")
    assert captions(source) == {"1": {"raw": ("first",)}}
    assert source.bad.counts == {"member twice in tar": 1}
    assert source.bad.num_bad == 0


def test_links_and_names_that_lead_out_are_only_names(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    (tmp_path / "outside.jpg").write_bytes(jpeg)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("../outside.txt", b"up"),
            ("/etc/x.jpg", jpeg),
            ("/etc/x.txt", b"abs"),
            ("../../y.jpg", jpeg),
            ("../../y.txt", b"y"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("../outside.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside.jpg")
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    source = source_of(path)
    samples = list(source)
    assert [sample.id for sample in samples] == ["/etc/x", "../../y"]
    assert {sample.image.path for sample in samples} == {str(path)}
    assert source.bad.counts == {"no image": 1}
    assert sorted(tmp_path.rglob("*")) == before


def test_pickles_are_never_loaded(tmp_path: Path, make_tar: Make, source_of: Open, jpeg: bytes) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    trap = pickle.dumps(Trap())
    members = {"1.jpg": jpeg, "1.txt": "a", "1.pyd": trap, "1.pickle": trap, "2.pkl": trap, "2.txt": "b", "3.npy": trap}
    source = source_of(make_tar(tmp_path / "a.tar", members))
    assert list(captions(source)) == ["1"]
    assert source.bad.counts == {"no image": 2}
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_tar(tmp_path: Path, source_of: Open) -> None:
    for name, content, complaint in (
        ("empty.tar", b"", r"empty\.tar is empty \(0 bytes\)"),
        ("page.tar", b"<html>" * 300, "is no tar or its start is damaged"),
        ("short.tar", b"abc", "is no tar"),
        ("packed.tar", b"\x1f\x8b\x08" + b"x" * 600, "is no tar but compressed; unpack it"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=complaint) as caught:
            source_of(tmp_path / name)
        assert "\n" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(SourceError):
        source_of(tmp_path / "pipe.tar")


def test_an_empty_shard_among_others_is_no_error(tmp_path: Path, make_tar: Make, shard: Path, source_of: Open) -> None:
    make_tar(tmp_path / "00001.tar", {})
    assert len(list(source_of(tmp_path / "*.tar"))) == 3
    with pytest.raises(SourceError, match="no usable samples in 00001"):
        list(source_of(tmp_path / "00001.tar"))


def test_a_cut_tar_gives_what_comes_before(shard: Path, source_of: Open, caplog: pytest.LogCaptureFixture) -> None:
    whole = list(source_of(shard))
    with shard.open("r+b") as file:
        file.truncate(whole[2].image.offset + 100)
    source = source_of(shard)
    with caplog.at_level(logging.WARNING, "llm2clip"):
        assert list(source) == whole[:2]
    assert source.bad.counts == {"truncated tar": 1}
    assert source.bad.num_bad == 1
    assert "within '000000002.jpg'; 2 samples before that are kept" in caplog.text
    strict = source_of(shard, max_bad_fraction=0.05)
    with pytest.raises(TooManyBadSamples, match=r"1 of 3 samples are bad.*1 truncated tar"):
        list(strict)


def test_a_cut_anywhere_gives_whole_samples_or_one_clear_line(shard: Path, source_of: Open, tmp_path: Path) -> None:
    data = shard.read_bytes()
    whole = {sample.id: sample for sample in source_of(shard)}
    with tarfile.open(shard) as tar:
        texts = [m for m in tar if m.name.endswith(("txt", "json"))]  # a sample needs one of them beside its image
    path, given = tmp_path / "cut.tar", {}
    for cut in range(0, len(data), 331):
        path.write_bytes(data[:cut])
        found = []
        try:
            for sample in source_of(path):
                assert load_image(sample.image).size == (12, 8)
                assert set(sample.captions) <= set(whole[sample.id].captions)
                found.append(sample.id)
        except (SourceError, UsageError) as error:
            assert "\n" not in str(error)
        assert found == list(whole)[: len(found)]
        given[cut] = len(found)
    ends = [max(m.offset_data + m.size for m in texts if m.name.startswith(key)) for key in whole]
    for cut, number in given.items():
        assert number >= sum(end <= cut for end in ends), f"a sample that lies whole before byte {cut} is lost"
    assert set(given.values()) == {0, 1, 2, 3}
    start = whole["000000001"].image.offset - 512
    path.write_bytes(data[:start] + b"?" * 700 + data[start + 700 :])
    source = source_of(path)
    assert [sample.id for sample in source] == ["000000000"]
    assert source.bad.counts == {"damaged tar": 1}


@pytest.fixture
def remote(shard: Path) -> str:
    fsspec.filesystem("memory").pipe("/shards/00000.tar", shard.read_bytes())
    return "memory://shards/00000.tar"


def test_a_tar_behind_a_url_gives_the_same_samples(shard: Path, remote: str, source_of: Open) -> None:
    near, far = list(source_of(shard)), list(source_of(remote))
    assert [(s.id, s.captions, s.image.offset) for s in near] == [(s.id, s.captions, s.image.offset) for s in far]
    assert far[0].image.path == remote
    assert load_image(far[1].image).size == (12, 8)
    assert source_of(remote).fingerprint == source_of(shard).fingerprint


def test_defects_behind_a_url(tmp_path: Path, make_tar: Make, source_of: Open, jpeg: bytes) -> None:
    members: dict[str, bytes | str] = {
        "0.jpg": jpeg,
        "1.jpg": b"",
        "2.jpg": b"<html>",
        "3.txt": "x",
        "0.pkl": b"x" * 999,
    }
    members |= {f"{i}.txt": "a" for i in range(3)}
    data = make_tar(tmp_path / "a.tar", members).read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe("/defects/a.tar", data)
    source = source_of("memory://defects/a.tar")
    assert list(captions(source)) == ["0"]
    assert source.bad.counts == {"empty image": 1, "not an image": 1, "no image": 1}
    memory.pipe("/defects/a.tar", data[:800])
    source = source_of("memory://defects/a.tar")
    with pytest.raises(SourceError, match="no usable samples"):
        list(source)
    assert source.bad.counts == {"truncated tar": 1}


def test_a_stream_is_read_once_from_front_to_end(remote: str, source_of: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoSeek(io.BytesIO):
        def seek(self, *_: int) -> int:
            raise AssertionError("the stream was asked to go back")

    memory = fsspec.filesystem("memory")
    data = memory.cat_file("/shards/00000.tar")
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: NoSeek(data))
    assert len(list(source_of(remote))) == 3


def test_a_broken_connection_is_one_line(remote: str, source_of: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: int) -> bytes:
            raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", lambda *_, **__: Broken())
    with pytest.raises(
        SourceError, match=r"broke off at byte 0 \(connection reset by peer\); the same command goes on"
    ):
        list(source_of(remote))


def test_without_images_only_texts_are_asked_for(tmp_path: Path, make_tar: Make, source_of: Open, jpeg: bytes) -> None:
    tar = make_tar(tmp_path / "a.tar", {"1.txt": "one", "2.jpg": b"", "2.txt": "two"})
    source = source_of(tar, images=False)
    assert captions(source) == {"1": {"raw": ("one",)}, "2": {"raw": ("two",)}}
    assert next(iter(source)).image == ImageRef("")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_same_samples_as_webdataset_reads(shard: Path, source_of: Open) -> None:
    webdataset = pytest.importorskip("webdataset")
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    ours = list(source_of(shard))
    assert [sample["__key__"] for sample in theirs] == [sample.id for sample in ours]
    assert [sample["jpg"] for sample in theirs] == [read_bytes(sample.image) for sample in ours]
    assert [(sample["txt"].decode(),) for sample in theirs] == [sample.captions["raw"] for sample in ours]


def test_a_shard_that_webdataset_wrote(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"s{i}", "jpg": jpeg, "txt": f"t{i}", "json": {"long_caption": f"l{i}"}, "cls": i})
    assert captions(source_of(tmp_path / "a.tar"))["s2"] == {"raw": ("t2",), "long": ("l2",)}


@pytest.mark.parametrize(("image", "colour"), [(None, (200, 30, 40)), ("png", (10, 20, 250)), ("PNG", (10, 20, 250))])
def test_of_two_images_of_a_sample_the_named_one_is_taken(
    tmp_path: Path, make_tar: Make, make_image, source_of: Open, image: str | None, colour: tuple[int, ...]
) -> None:
    members = {"a.jpg": make_image(), "a.png": make_image(colour=(10, 20, 250), form="PNG"), "a.txt": "a caption"}
    (tmp_path / "folder").mkdir()
    for name, content in members.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "folder" / name).write_bytes(data)
    for place in (make_tar(tmp_path / "a.tar", members), tmp_path / "folder"):
        (sample,) = source_of(place, **({} if image is None else {"image": image}))
        assert load_image(sample.image).getpixel((4, 4)) == pytest.approx(colour, abs=6)
