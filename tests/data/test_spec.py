"""The source grammar."""

from __future__ import annotations

import importlib
from pathlib import Path

import fsspec
import pytest
from huggingface_hub.utils import get_session

from llm2clip.data.config import SourceConfig
from llm2clip.data.source import open_source
from llm2clip.data.spec import expand_braces, find_files
from llm2clip.errors import SourceError, UsageError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for i in range(3):
        (tmp_path / f"{i:05d}.tar").write_bytes(b"x" * i)
    return tmp_path


def names(spec: str | Path) -> list[str]:
    return [Path(file.path).name for file in find_files(str(spec))]


def test_path_glob_and_braces(shards: Path) -> None:
    assert names(shards / "00001.tar") == ["00001.tar"]
    assert names(shards / "*.tar") == names(shards / "{00000..00002}.tar") == ["00000.tar", "00001.tar", "00002.tar"]
    assert names(shards / "0000{2,0}.tar") == ["00002.tar", "00000.tar"]
    (shards / "deep" / "er").mkdir(parents=True)
    (shards / "deep" / "er" / "9.tar").touch()
    assert names(shards / "**" / "9.tar") == ["9.tar"]
    assert [file.size for file in find_files(f"{shards}/*.tar")] == [0, 1, 2]


def test_braces() -> None:
    assert list(expand_braces("{9..11}")) == ["9", "10", "11"]
    assert list(expand_braces("{08..10}")) == ["08", "09", "10"]
    assert list(expand_braces("{a,b}{1..2}")) == ["a1", "a2", "b1", "b2"]
    assert list(expand_braces("plain{x}")) == ["plain{x}"]
    with pytest.raises(UsageError, match="too long"):
        list(expand_braces("{0..99999999999}"))
    with pytest.raises(UsageError, match="stands for"):
        list(expand_braces("{0..9999}{0..9999}"))


def test_a_name_that_really_holds_braces(tmp_path: Path) -> None:
    (tmp_path / "a{1,2}[x].csv").touch()
    assert names(tmp_path / "a{1,2}[x].csv") == ["a{1,2}[x].csv"]


def test_home_and_relative_paths(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    monkeypatch.setenv("HOME", str(shards))
    assert find_files("~/00001.tar") == find_files("00001.tar") == find_files(str(shards / "00001.tar"))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("nothing.tar", "no such file or folder"),
        ("*.parquet", "nothing matches"),
        ("{a,b}.tar", "nothing matches"),
        ("{00000..00007}.tar", "00003.tar is missing (5 missing in all, 3 found)"),
        ("notes.md", "unknown ending '.md'; give a folder, hf:org/name, .tar, .csv"),
        ("a.tar.gz", "is compressed; unpack it first"),
        ("a.tgz", "is compressed"),
    ],
)
def test_what_is_not_there_or_not_known(shards: Path, spec: str, complaint: str) -> None:
    for name in ("notes.md", "a.tar.gz", "a.tgz"):
        (shards / name).touch()
    with pytest.raises(UsageError) as caught:
        open_source(SourceConfig(data=(str(shards / spec),)))
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(f"data {shards}")


def test_upper_case_endings(tmp_path: Path) -> None:
    (tmp_path / "A.TAR").touch()
    assert find_files(str(tmp_path / "A.TAR"))[0].kind == "tar"


@pytest.mark.parametrize("client", ["the Hub's", "aiohttp"])
def test_a_client_that_finds_no_host(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    if client == "aiohttp":
        error = pytest.importorskip("aiohttp").ClientError("no such host")
    else:
        session = get_session()
        error = importlib.import_module(type(session).__module__.partition(".")[0]).ConnectError("no such host")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", fail)
    with pytest.raises(SourceError, match=r"memory://a/1\.tar cannot be reached: no such host"):
        find_files("memory://a/1.tar")


def test_urls() -> None:
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe(f"/specs/{i}.tar", b"x" * i)
    assert [(f.path, f.size) for f in find_files("memory://specs/*.tar")] == [
        (f"memory:///specs/{i}.tar", i) for i in range(3)
    ]
    assert [f.size for f in find_files("memory://specs/{1..2}.tar")] == [1, 2]
    with pytest.raises(UsageError, match=r"3\.tar does not exist"):
        find_files("memory://specs/{1..9}.tar")
    with pytest.raises(UsageError, match="nothing matches"):
        find_files("memory://specs/*.csv")
    with pytest.raises(UsageError, match=r"URL/\*\.tar"):
        open_source(SourceConfig(data=("memory://specs/",)))
    with pytest.raises(SourceError, match=r"cannot be reached.*nonsense"):
        find_files("nonsense://specs/1.tar")
