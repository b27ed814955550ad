"""Names on the Hub, asked of a server on this machine: misspelt, gone, unreachable; said at once and in one line."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from llm2clip import on_hub
from llm2clip.data.config import SourceConfig
from llm2clip.data.source import open_source
from llm2clip.errors import SourceError, UsageError

Serve = Callable[..., list[str]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Put a server in the Hub's place that gives every request this status, and returns the paths asked for."""
    asked: list[str] = []
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, headers: dict[str, str] | None = None) -> list[str]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815  (its name in http.server)

            def log_message(self, *arguments: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        go_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def go_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Hub's libraries go online, to this endpoint."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def closed_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    go_to(f"http://127.0.0.1:{port}", monkeypatch)


@pytest.mark.parametrize(("status", "headers"), [(404, None), (401, {"X-Error-Code": "RepoNotFound"})])
def test_a_misspelt_name(serve: Serve, status: int, headers: dict[str, str] | None) -> None:
    asked = serve(status, headers)
    with pytest.raises(UsageError) as told:
        on_hub.check_model("openai/clip-vitt", what="--model")
    assert str(told.value) == (
        "--model openai/clip-vitt is no folder here, and the Hub has no model of that name that you may read; look at "
        "its spelling; a private or gated one needs: hf auth login"
    )
    assert len([path for path in asked if "clip-vitt" in path]) == 1, "asked once"
    with pytest.raises(UsageError, match="the Hub has no model of that name"):
        on_hub.model_folder("openai/clip-vitt")


def test_a_revision_that_is_not_there(serve: Serve) -> None:
    serve(404, {"X-Error-Code": "RevisionNotFound"})
    with pytest.raises(UsageError, match="and the Hub has no revision 'v9' of it; look at its branches and tags"):
        on_hub.check_model("openai/clip", revision="v9")


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_is_down_is_asked_once(serve: Serve, status: int) -> None:
    asked = serve(status)
    with pytest.raises(UsageError, match=r"the Hub cannot be reached \(.*\); give what lies here, or go where"):
        on_hub.model_folder("openai/clip")
    assert len([path for path in asked if "openai" in path]) == 1


def test_without_a_network(closed_port: None) -> None:
    with pytest.raises(UsageError) as told:
        on_hub.check_model("openai/clip", what="--tower")
    assert str(told.value).startswith("--tower openai/clip is no folder here, and the Hub cannot be reached (")
    assert "\n" not in str(told.value) and "refused" in str(told.value)


def test_a_dataset_without_a_network_is_not_tried_for_half_a_minute(
    closed_port: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(SourceError, match=r"^data hf:org/nameless cannot be loaded: .*; the Hub cannot be reached \("):
        open_source(SourceConfig(data=("hf:org/nameless",)))
    assert not waits
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE, "put back"


def test_a_misspelt_dataset(serve: Serve) -> None:
    serve(404)
    with pytest.raises(
        UsageError, match=r"^data hf:org/nameless: the Hub has no dataset of that name that you may read"
    ):
        open_source(SourceConfig(data=("hf:org/nameless",)))


def test_a_model_in_the_cache_needs_no_network(
    closed_port: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    repository = tmp_path / "models--org--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    on_hub.check_model("org/name")
    assert on_hub.model_folder("org/name") == repository / "snapshots" / commit
    with pytest.raises(UsageError, match="org/other is no folder here, and the Hub cannot be reached"):
        on_hub.model_folder("org/other")


def test_a_name_that_can_be_none(closed_port: None) -> None:
    with pytest.raises(UsageError, match=r"^'' is no folder"):
        on_hub.model_folder("")
    with pytest.raises(UsageError, match="my model is no folder here, and no Hub id that can be"):
        on_hub.check_model("my model")
