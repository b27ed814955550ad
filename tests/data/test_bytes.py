"""Bytes of an image from files, ranges and URLs; what is kept open."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm2clip.data import bytes as reading
from llm2clip.data.bad import BadImage
from llm2clip.data.bytes import Kept, OpenFile, read_at, read_bytes
from llm2clip.data.sample import ImageRef


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "data.bin").write_bytes(bytes(range(100)))
    return str(tmp_path / "data.bin")


def test_whole_file_range_and_url(file: str) -> None:
    assert read_bytes(ImageRef(file)) == bytes(range(100))
    assert read_bytes(ImageRef(file, 10, 5)) == bytes(range(10, 15))
    assert read_bytes(ImageRef(f"file://{file}", 10, 5)) == bytes(range(10, 15))
    assert read_bytes(ImageRef(f"file://{file}")) == bytes(range(100))


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_causes(file: str, prefix: str) -> None:
    for ref, cause in {
        ImageRef(prefix + file, 10, 0): "empty image",
        ImageRef(prefix + file, 95, 10): "truncated file",
        ImageRef(prefix + file, 200, 10): "truncated file",
        ImageRef(prefix + file + "x"): "missing file",
        ImageRef(prefix + file, 0, 1 << 40): "image too large",
    }.items():
        with pytest.raises(BadImage) as caught:
            read_bytes(ref)
        assert caught.value.cause == cause


def test_unknown_protocol_is_a_bad_image() -> None:
    with pytest.raises(BadImage, match="unreadable file"):
        read_bytes(ImageRef("nonsense://host/a.jpg"))


def test_a_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadImage, match="no regular file"):
        read_bytes(ImageRef(str(tmp_path / "pipe.jpg")))


def test_few_files_stay_open(tmp_path: Path) -> None:
    files = Kept(OpenFile, limit=3)
    descriptors = {}
    for i in range(5):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 4)
        descriptors[i] = files.get(str(tmp_path / str(i))).descriptor
        files.get(str(tmp_path / "0"))  # used all the time, so it stays
    assert list(files._files) == [str(tmp_path / str(i)) for i in (3, 4, 0)]
    assert files.get(str(tmp_path / "0")).descriptor == descriptors[0]
    assert read_at(descriptors[0], 9, 1) == b"\0\0\0"
    del files
    with pytest.raises(OSError):
        os.fstat(descriptors[0])


def test_a_file_in_use_is_not_closed_under_its_reader(file: str, tmp_path: Path) -> None:
    files = Kept(OpenFile, limit=1)
    held = files.get(file)
    (tmp_path / "other").write_bytes(b"other")
    files.get(str(tmp_path / "other"))
    assert read_at(held.descriptor, 3, 0) == b"\0\1\2"


def test_many_threads_read_right_bytes_of_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_open_files", Kept(OpenFile, limit=1))
    for i in range(8):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 100)
    refs = [ImageRef(str(tmp_path / str(i % 8)), i % 50, 10) for i in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        assert [data[0] for data in pool.map(read_bytes, refs)] == [i % 8 for i in range(2000)]


def test_a_forked_child_opens_its_own(file: str) -> None:
    files = Kept(OpenFile, limit=3)
    mine = files.get(file)
    assert files.get(file) is mine
    files._lock.acquire()  # as a thread of the parent may have, when the child was born
    files._pid -= 1
    assert files.get(file) is not mine
    assert read_at(mine.descriptor, 3, 0) == b"\0\1\2"


def test_reading_many_shards_keeps_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_open_files", Kept(OpenFile, limit=2))
    for i in range(5):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 10)
    for _ in range(2):
        assert [read_bytes(ImageRef(str(tmp_path / f"{i}"), 3, 2)) for i in range(5)] == [
            bytes([i] * 2) for i in range(5)
        ]
    assert len(reading._open_files._files) == 2


def test_a_system_that_reads_a_little_at_a_time(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: pread(descriptor, min(length, 3), offset))
    for ref in (ImageRef(file), ImageRef(file, 10, 50), ImageRef(file, 98, 2)):
        first = ref.offset
        assert read_bytes(ref) == bytes(range(first, 100 if ref.length < 0 else first + ref.length))
    with pytest.raises(BadImage, match="ends 5 bytes before the image at 95 does"):
        read_bytes(ImageRef(file, 95, 10))


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_the_largest_image_is_read(file: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_IMAGE_BYTES", 50)
    assert len(read_bytes(ImageRef(prefix + file, 10, 50))) == 50
    with pytest.raises(BadImage, match="51 bytes"):
        read_bytes(ImageRef(prefix + file, 10, 51))


def test_a_whole_file_that_is_too_large(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_IMAGE_BYTES", 100)
    assert len(read_bytes(ImageRef(file))) == 100
    monkeypatch.setattr(reading, "MAX_IMAGE_BYTES", 99)
    with pytest.raises(BadImage, match="has 100 bytes"):
        read_bytes(ImageRef(file))


def test_a_member_of_a_zip_and_base64_in_a_line(tmp_path: Path) -> None:
    import base64
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/1.jpg", b"one" * 99)
    assert read_bytes(ImageRef(str(tmp_path / "a.zip"), column="images/1.jpg")) == b"one" * 99
    with pytest.raises(BadImage, match=r"missing file: .*a\.zip holds no images/2\.jpg"):
        read_bytes(ImageRef(str(tmp_path / "a.zip"), column="images/2.jpg"))
    with pytest.raises(BadImage, match=r"missing file: .*b\.zip"):
        read_bytes(ImageRef(str(tmp_path / "b.zip"), column="images/1.jpg"))
    (tmp_path / "damaged.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-30])
    with pytest.raises(BadImage, match="unreadable file"):
        read_bytes(ImageRef(str(tmp_path / "damaged.zip"), column="images/1.jpg"))
    line = b"7\t" + base64.b64encode(b"bytes of an image")
    (tmp_path / "images.tsv").write_bytes(line + b"\n")
    ref = ImageRef(str(tmp_path / "images.tsv"), 2, len(line) - 2, "base64")
    assert read_bytes(ref) == b"bytes of an image"
    (tmp_path / "images.tsv").write_bytes(base64.urlsafe_b64encode(b"\xfb\xff\xfe"))  # as some write it: -__-
    assert read_bytes(ImageRef(str(tmp_path / "images.tsv"), 0, 4, "base64")) == b"\xfb\xff\xfe"
    (tmp_path / "images.tsv").write_bytes(line)
    with pytest.raises(BadImage, match="holds no base64"):
        read_bytes(ImageRef(str(tmp_path / "images.tsv"), 1, 5, "base64"))


def test_a_column_that_is_called_base64(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"base64": [b"one", b"two"]}), tmp_path / "a.parquet")
    assert read_bytes(ImageRef(str(tmp_path / "a.parquet"), 1, column="base64")) == b"two"
