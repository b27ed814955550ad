"""A Hub on this machine: repositories of models and datasets in memory, spoken to by the Hub's own libraries.

It knows what downloading and uploading take: information, file lists, files with ranges, commits. `requests` is the
log of all that was asked, `files` of the files that were sent.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Repository:
    """The newest files of a repository; its commit is a digest of them."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    @property
    def commit(self) -> str:
        parts = [f"{name}:{hashlib.sha1(data).hexdigest()}" for name, data in sorted(self.files.items())]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()


class LoopbackHub:
    """The server and what lies on it."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.files: list[str] = []
        self.close_writing = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Path | Mapping[str, bytes], *, kind: str = "model", **facts: bool) -> Repository:
        """Put a folder, or files by name, there as a repository."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        self.repositories[kind, name] = Repository(dict(files), **facts)
        return self.repositories[kind, name]

    def sent(self, name: str) -> set[str]:
        """The files of a repository whose content was sent."""
        return {path.removeprefix(f"{name}/") for path in self.files if path.startswith(f"{name}/")}

    def forget(self) -> None:
        """Begin the logs anew."""
        self.requests.clear()
        self.files.clear()


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.hub.requests.append((self.command, path))
        if self.hub.close_writing and self.command == "POST":
            return self._error(403, "Forbidden")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/api/whoami"):
            return self._json({"name": "org", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._api(KINDS[found[1]], found[2], found[3] or "", body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file("dataset" if found[1] else "model", found[2], found[3], found[4])
        return self._error(404, "RepoNotFound")

    def _repository(self, kind: str, name: str, revision: str = "main") -> Repository | None:
        """The repository if it may be read; else the answer is given."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and "authorization" not in self.headers):
            self._error(401, "RepoNotFound")
        elif revision not in ("main", "refs/heads/main", repository.commit):
            self._error(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _api(self, kind: str, name: str, rest: str, body: bytes) -> None:
        what, _, where = rest.partition("/")
        revision, _, below = where.partition("/")
        if what in ("discussions", "refs"):
            return self._json({"discussions": [], "count": 0, "start": 0, "branches": [], "tags": [], "converts": []})
        repository = self._repository(kind, name, revision or "main")
        if repository is None:
            return None
        if what in ("", "revision"):
            facts: dict[str, Any] = {
                "id": name,
                "modelId": name,
                "sha": repository.commit,
                "private": repository.private,
            }
            siblings = [{"rfilename": file} for file in sorted(repository.files)]
            front = re.match(rb"---\n(.*?)\n---", repository.files.get("README.md", b""), re.DOTALL)
            facts |= {"cardData": yaml.safe_load(front[1])} if front else {}
            return self._json({**facts, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings, "gated": False})
        if what == "tree":
            return self._tree(repository, below)
        if what == "paths-info":
            asked = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            return self._json([_entry(file, repository.files[file]) for file in asked if file in repository.files])
        if what == "commits":
            return self._json([{"id": repository.commit, "title": "", "message": "", "authors": [], "date": DATE}])
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if what == "commit":
            return self._commit(name, repository, body)
        return self._error(404, "EntryNotFound")

    def _tree(self, repository: Repository, below: str) -> None:
        start = f"{below}/" if below else ""
        entries: dict[str, dict[str, Any]] = {}
        recursive = "recursive=true" in self.path.lower() or "recursive=1" in self.path
        for file, data in sorted(repository.files.items()):
            if file.startswith(start):
                inside = file.removeprefix(start).split("/")
                for depth in range(1, len(inside)):
                    folder = start + "/".join(inside[:depth])
                    if recursive or depth == 1:
                        entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
                if recursive or len(inside) == 1:
                    entries[file] = _entry(file, data)
        if below and not entries:
            return self._error(404, "EntryNotFound")
        return self._json(list(entries.values()))

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name, revision)
        if repository is None:
            return None
        if repository.gated:
            return self._error(403, "GatedRepo")
        if path not in repository.files:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        data = repository.files[path]
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{hashlib.sha1(path.encode() + data).hexdigest()}"'}
        headers["Accept-Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data = data[start : end + 1]
        if self.command == "GET":
            self.hub.files.append(f"{name}/{path}")
        return self._send(206 if asked else 200, data, {**headers, "Content-Type": "application/octet-stream"})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = "/".join(filter(None, [wanted.get("organization") or "org", wanted["name"]]))
        kind = wanted.get("type") or "model"
        if (kind, name) in self.hub.repositories:
            there = json.dumps({"url": f"{self.hub.endpoint}/{name}"}).encode()
            return self._send(409, there, {"Content-Type": "application/json"})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.add(name, {}, kind=kind, private=private)
        return self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                repository.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                repository.files.pop(entry["value"]["path"], None)
        facts = {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{repository.commit}", "commitOid": repository.commit}
        return self._json({**facts, "success": True, "hookOutput": ""})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


DATE = "2026-01-01T00:00:00.000Z"


def _entry(file: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": file, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
