"""`train-student` on tars behind a real HTTP server: fetched once each, killed in the middle of one, the same bytes."""

from __future__ import annotations

import functools
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .banks import colour

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.slow
SHARDS, IMAGES = 20, 6  # so many that the last ones are fetched after the first checkpoint


class Server(ThreadingHTTPServer):
    """Serves a folder and counts what it gives; in the middle of the `deadly`-th file it kills the `victim`."""

    given: Counter[str]
    deadly, victim = 0, 0


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        self.server.given[Path(self.path).name] += 1
        if self.server.victim and len(self.server.given) >= self.server.deadly:
            outputfile.write(source.read(2000))
            outputfile.flush()
            os.kill(self.server.victim, signal.SIGKILL)
            self.server.victim = 0
            self.close_connection = True
            return
        super().copyfile(source, outputfile)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * IMAGES, (shard + 1) * IMAGES):
                buffer = io.BytesIO()
                Image.new("RGB", (40, 30), colour(number)).save(buffer, "PNG")
                for ending, content in (("png", buffer.getvalue()), ("txt", f"image {number}".encode())):
                    entry = tarfile.TarInfo(f"{number:05d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.given = Counter()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_run_on_remote_tars_survives_a_kill(server: Server, tiny_llm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig

    urls = f"http://127.0.0.1:{server.server_address[1]}/{{00000..{SHARDS - 1:05d}}}.tar"
    bank = build_bank(BankConfig(data=(urls,), teacher=str(tiny_llm), out=tmp_path / "bank"))

    def ends(name: str, *, deadly: int = 0) -> int:
        """Run `train-student`, to its end or until the server gives out that file; how it ended."""
        command = [sys.executable, "-m", "llm2clip", "train-student", "--bank", str(bank), "--tower", str(tiny_tower)]
        command += ["--out", str(tmp_path / name), "--batch-size", "8", "--steps", "16", "--save-every", "2"]
        command += ["--dim", "16", "--workers", "2", "--precision", "fp32", "--tracker", "none"]
        environment = {**os.environ, "LLM2CLIP_SHARD_CACHE": str(tmp_path / f"cache-{name}")}
        server.given = Counter()
        with (tmp_path / "errors").open("w") as errors:  # no pipe: readers that outlive the kill would hold it
            process = subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)
            server.deadly, server.victim = deadly, process.pid if deadly else 0
            return process.wait()

    def errors() -> str:
        return (tmp_path / "errors").read_text()

    def cached(name: str) -> list[bytes]:
        return sorted(path.read_bytes() for path in (tmp_path / f"cache-{name}").glob("*.tar"))

    assert ends("whole") == 0, errors()
    tars = {path.name: path.read_bytes() for path in (tmp_path / "served").iterdir()}
    assert server.given == dict.fromkeys(tars, 1) and cached("whole") == sorted(tars.values())

    assert ends("broken", deadly=17) == -signal.SIGKILL, errors()
    there = len(cached("broken"))
    assert there < SHARDS and list((tmp_path / "broken" / "checkpoints").glob("step-*"))
    assert ends("broken") == 0 and "going on from step" in errors(), errors()
    assert len(server.given) <= SHARDS - there, "what was there has been fetched again"
    assert cached("broken") == sorted(tars.values())
    for name in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
