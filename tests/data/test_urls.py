"""Sources behind a real HTTP server, with and without range requests."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llm2clip.data.bad import BadImage
from llm2clip.data.images import load_image
from llm2clip.data.source import Source
from llm2clip.errors import SourceError, UsageError

pytest.importorskip("aiohttp")
Open = Callable[..., Source]


class Whole(SimpleHTTPRequestHandler):
    """Serves a folder; ignores ranges."""

    def log_message(self, *_: object) -> None:
        pass


class Ranges(Whole):
    """Serves a folder; answers ranges."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or not path.is_file():
            return super().do_GET()
        data = path.read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])
        return None

    def send_head(self) -> object:
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


@pytest.fixture
def folder(tmp_path: Path, make_tar: Callable[..., Path], make_image: Callable[..., bytes]) -> Path:
    for shard in range(2):
        members: dict[str, bytes | str] = {}
        for i in range(3):
            members |= {f"{shard}{i}.jpg": make_image((i + 5, 9)), f"{shard}{i}.txt": f"image {i}"}
        make_tar(tmp_path / f"{shard:05d}.tar", members)
    (tmp_path / "x.jpg").write_bytes(make_image())
    (tmp_path / "t.csv").write_text("image,caption\nx.jpg,one\n")
    return tmp_path


def serve(folder: Path, handler: type[SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def ranges(folder: Path) -> Iterator[str]:
    yield from serve(folder, Ranges)


@pytest.fixture
def whole(folder: Path) -> Iterator[str]:
    yield from serve(folder, Whole)


def test_tars_and_their_images(ranges: str, source_of: Open) -> None:
    samples = list(source_of(f"{ranges}/{{00000..00001}}.tar"))
    assert [sample.id for sample in samples] == [f"{s:05d}/{s}{i}" for s in range(2) for i in range(3)]
    assert [load_image(sample.image).width for sample in samples] == [5, 6, 7] * 2


def test_a_table_and_its_images(ranges: str, source_of: Open) -> None:
    (sample,) = source_of(f"{ranges}/t.csv")
    assert sample.captions == {"raw": ("one",)}
    assert load_image(sample.image).size == (12, 8)


def test_a_server_without_ranges_streams_but_gives_no_single_images(whole: str, source_of: Open) -> None:
    samples = list(source_of(f"{whole}/00000.tar"))
    assert [sample.captions["raw"] for sample in samples] == [(f"image {i}",) for i in range(3)]
    with pytest.raises(BadImage, match="gives whole files only; fetch it to a local disk"):
        load_image(samples[1].image)


def test_what_is_not_there(ranges: str, source_of: Open) -> None:
    with pytest.raises(UsageError, match=r"00002\.tar does not exist"):
        source_of(f"{ranges}/{{00000..00002}}.tar")
    with pytest.raises(UsageError, match="does not exist, or its server does not answer"):
        source_of("http://127.0.0.1:9/00000.tar")
    with pytest.raises(BadImage, match="missing file"):
        load_image(f"{ranges}/gone.jpg")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, source_of: Open) -> None:
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(SourceError, match=r"Install s3fs to access S3\); type: pip install 'llm2clip\[remote\]'"):
        source_of("s3://bucket/0.tar")
