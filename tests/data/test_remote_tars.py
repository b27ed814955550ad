"""Tars behind URLs are read once; their indexes serve the next stage and the run that goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llm2clip.data.bad import BadImage
from llm2clip.data.remote_tars import TarIndex, index_folder
from llm2clip.data.source import Source
from llm2clip.data.tars import Member
from llm2clip.errors import SourceError

Open = Callable[..., Source]
memory = fsspec.filesystem("memory")


@pytest.fixture
def remote(tmp_path: Path, make_tar: Callable[..., Path], jpeg: bytes) -> str:
    """Three shards of two good samples and a bad one."""
    for shard in range(3):
        members = {
            "a.jpg": jpeg,
            "a.txt": f"a{shard} 狗",
            "b.jpg": jpeg,
            "b.json": '{"long_caption": "b"}',
            "c.jpg": b"<html>",
        }
        memory.pipe(f"/indexed/{shard}.tar", make_tar(tmp_path / f"{shard}.tar", members).read_bytes())
    return "memory://indexed/{0..2}.tar"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The remote files opened, in order."""
    names: list[str] = []
    original = type(memory).open

    def noting(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        names.append(path)
        return original(self, path, *arguments, **options)

    monkeypatch.setattr(type(memory), "open", noting)
    return names


def test_members_survive_the_round_trip() -> None:
    members = [
        Member("ä/狗.txt", 512, 3, b"abc"),
        Member("odd\udce9.txt", 1536, 0, b""),
        Member("x.jpg", 2048, 9),
        Member("y.jpg", 4096, 9, None, BadImage("not an image", "y.jpg is in no known format")),
    ]
    index = TarIndex("https://host/a.tar", {"size": 9999}, images=True)
    assert index.load() is None
    index.save(members)
    found = index.load()
    assert found is not None
    assert found[:3] == members[:3]
    assert str(found[3].defect) == str(members[3].defect)


def test_the_second_reading_opens_nothing(remote: str, source_of: Open, opened: list[str]) -> None:
    source = source_of(remote)
    first = list(source)
    counts = source.bad.to_json()
    assert len(first) == 6
    assert counts["counts"] == {"not an image": 3}
    assert opened == ["/indexed/0.tar", "/indexed/1.tar", "/indexed/2.tar"]
    again = source_of(remote)
    assert list(again) == first
    assert again.bad.to_json() == counts
    assert len(opened) == 3


def test_a_stopped_run_goes_on_at_the_shard_it_was_in(remote: str, source_of: Open, opened: list[str]) -> None:
    samples = iter(source_of(remote))
    for _ in range(3):  # one sample into the second shard
        next(samples)
    samples.close()  # type: ignore[attr-defined]
    del opened[:]
    assert len(list(source_of(remote))) == 6
    assert opened == ["/indexed/2.tar"]  # a shard is scanned whole before its first sample comes


def test_a_shard_that_changed_is_read_again(remote: str, source_of: Open, opened: list[str], tmp_path: Path) -> None:
    list(source_of(remote))
    memory.pipe("/indexed/1.tar", (tmp_path / "0.tar").read_bytes())
    del opened[:]
    assert [sample.captions for sample in source_of(remote)][2] == {"raw": ("a0 狗",)}
    assert opened == ["/indexed/1.tar"]


def test_captions_alone_have_an_index_of_their_own(remote: str, source_of: Open) -> None:
    list(source_of(remote, images=False))
    source = source_of(remote)
    list(source)
    assert source.bad.counts == {"not an image": 3}


def test_a_damaged_index_is_written_anew(remote: str, source_of: Open, opened: list[str]) -> None:
    first = list(source_of(remote))
    for path in index_folder().iterdir():
        path.write_bytes(path.read_bytes()[:200])
    assert list(source_of(remote)) == first
    assert len(opened) == 6
    assert list(source_of(remote)) == first
    assert len(opened) == 6


def test_a_cut_tar_gets_no_index(remote: str, source_of: Open) -> None:
    memory.pipe("/indexed/1.tar", memory.cat_file("/indexed/1.tar")[:3000])
    source = source_of(remote)
    list(source)
    assert source.bad.counts["truncated tar"] == 1
    assert len(list(index_folder().iterdir())) == 2


def test_a_connection_that_ends_early_is_no_truncated_tar(
    remote: str, source_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = memory.info("/indexed/0.tar")["size"]
    original = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda *a, **k: {**original(*a, **k), "size": size + 10_000})
    memory.pipe("/indexed/0.tar", memory.cat_file("/indexed/0.tar")[:3000])
    with pytest.raises(SourceError, match=rf"broke off at byte 3000 \({size + 10_000} bytes were expected\)"):
        list(source_of("memory://indexed/0.tar"))


def test_without_a_place_to_keep_it_the_run_goes_on(
    remote: str, source_of: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM2CLIP_INDEX_CACHE", str(tmp_path / "file" / "indexes"))
    with caplog.at_level(logging.WARNING, "llm2clip"):
        assert len(list(source_of(remote))) == 6
    assert "set LLM2CLIP_INDEX_CACHE to another folder" in caplog.text


def test_the_usual_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLM2CLIP_INDEX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert index_folder() == tmp_path / "llm2clip" / "tar-indexes"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index_folder() == tmp_path / ".cache" / "llm2clip" / "tar-indexes"


def test_an_index_is_of_one_url_state_and_way_of_reading() -> None:
    base = {"size": 9}
    paths = {TarIndex(f"memory://{name}.tar", base, images=True).path for name in "ab"}
    paths.add(TarIndex("memory://a.tar", base, images=False).path)
    states = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "blob_id", "xet_hash", "lfs")
    paths |= {TarIndex("memory://a.tar", {**base, name: 1}, images=True).path for name in states}
    paths |= {TarIndex("memory://a.tar", {"size": 10}, images=True).path}
    assert len(paths) == 3 + 9 + 1 and None not in paths
    assert TarIndex("memory://a.tar", {"name": "a"}, images=True).path is None, "nothing tells when it changes"
    assert TarIndex("memory://a.tar", {**base, "name": "a"}, images=True).path in paths


def test_a_long_index_comes_back_whole() -> None:
    members = [Member(f"{i}.txt", 512 * i, i, b"x" * i) for i in range(10)]
    index = TarIndex("memory://long.tar", {"size": 1}, images=True)
    index.save(members)
    assert index.load() == members
