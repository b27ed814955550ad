"""Fetching a benchmark from a server in this process: whole, broken off, refused."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm2clip.errors import SourceError, UsageError
from llm2clip.eval import run
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.download import download
from llm2clip.eval.named import card_of

from .lookalikes import image, write


class Server:
    """Files by name; of one in `cut` so many bytes are sent and the line goes dead."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, wanted = self.path[1:], self.headers["Range"]
                server.asked.append((name, wanted))
                if name not in server.files:
                    self.send_error(404)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
                content = server.files[name][start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: server.cut.pop(name, len(content))])

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def card(self, *names: str) -> Any:
        return replace(
            card_of("docci"), downloads=tuple(f"http://127.0.0.1:{self.server.server_port}/{name}" for name in names)
        )


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.files["captions.jsonl"] = bytes(range(256)) * 40
    yield server
    server.server.shutdown()
    server.server.server_close()


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def test_files_are_kept_and_tars_unpacked_once(server: Server, tmp_path: Path) -> None:
    server.files["images.tgz"] = tar({"./a.jpg": b"one", "images/b.jpg": b"two", "images/._b.jpg": b"junk"})
    card = server.card("captions.jsonl", "images.tgz")
    for _ in range(2):
        download("docci", card, tmp_path)
    found = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {
        "docci/captions.jsonl": server.files["captions.jsonl"],
        "docci/images/a.jpg": b"one",
        "docci/images/b.jpg": b"two",
    }
    assert server.asked == [("captions.jsonl", None), ("images.tgz", None)]


@pytest.mark.parametrize("ranges", [True, False])
def test_what_broke_off_goes_on_or_begins_anew(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cut["captions.jsonl"], server.ranges = 4000, ranges
    card = replace(server.card("captions.jsonl"), variant_of="docci")
    with pytest.raises(SourceError, match="the same command goes on"):
        download("other", card, tmp_path)
    assert not (tmp_path / "docci" / "captions.jsonl").exists()
    download("other", card, tmp_path)
    assert (tmp_path / "docci" / "captions.jsonl").read_bytes() == server.files["captions.jsonl"]
    assert server.asked == [("captions.jsonl", None), ("captions.jsonl", "bytes=4000-")]


def test_what_cannot_be_fetched_is_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"/gone.zip: the server says 404 Not Found$"):
        download("docci", server.card("gone.zip"), tmp_path)
    server.files["images.tar.gz"] = tar({"a.jpg": b"one"})[:-30]
    with pytest.raises(SourceError, match=r"images.tar.gz cannot be unpacked .*; delete it and fetch it again"):
        download("docci", server.card("images.tar.gz"), tmp_path)
    assert not (tmp_path / "docci" / "images").exists()
    with pytest.raises(
        UsageError, match=r"coco-karpathy must be fetched by hand \(annotations CC BY 4.0; images by their"
    ):
        download("coco-karpathy", card_of("coco-karpathy"), tmp_path)
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(SourceError, match="refused"):
        download("docci", server.card("captions.jsonl"), tmp_path)


def test_only_the_sets_whose_licence_allows_it_have_addresses() -> None:
    from llm2clip.eval import benchmarks
    from llm2clip.parts import part_names

    free = {name for name in part_names(benchmarks) if card_of(name).downloads}
    assert free == {"docci", "xm3600", "xm3600-first"}
    assert all("CC BY" in card_of(name).licence and "NC" not in card_of(name).licence for name in free)


def test_without_a_benchmark_there_is_nothing_to_fetch() -> None:
    with pytest.raises(UsageError, match="download fetches what benchmark NAME takes; name one"):
        EvaluateConfig(data=("test.csv",), out=Path("report"), model="student", download=True)


def test_evaluate_fetches_before_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(name: str, card: Any, root: Path) -> None:
        write(root / name, {f"{kind}/{i}.png": image(i) for i, kind in enumerate(("disc", "star"))})

    monkeypatch.setattr(run, "download", fake)
    settings = {"benchmark": ("class-folders",), "root": str(tmp_path), "model": "none", "out": tmp_path / "report"}
    with pytest.raises(UsageError, match="none"):  # there is no such model: the files were there
        run.evaluate(EvaluateConfig(**settings, download=True))
    assert (tmp_path / "class-folders" / "star" / "1.png").exists()
