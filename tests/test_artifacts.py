"""Artifact folders: manifest last, locked, resumed with the same settings only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm2clip import artifacts
from llm2clip.errors import ArtifactError, UsageError


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    with artifacts.open_output(folder, "bank", config={"seed": 1}) as began:
        assert not began and not artifacts.is_complete(folder)
        artifacts.write_manifest(folder, "bank", config={"seed": 1}, rows=3)
    assert artifacts.read_manifest(folder, "bank")["rows"] == 3
    with artifacts.open_output(folder, "bank", config={"seed": 1}) as began:
        assert began and artifacts.is_complete(folder)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with artifacts.open_output(tmp_path / "x", "bank", config={"seed": 1, "dtype": "float16"}):
        pass
    with (
        pytest.raises(UsageError, match="seed was 1, now 2"),
        artifacts.open_output(tmp_path / "x", "bank", config={"seed": 2, "dtype": "float16"}),
    ):
        pass


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    with (
        artifacts.open_output(tmp_path / "x", "bank", config={}),
        pytest.raises(UsageError, match="in use by another process"),
        artifacts.open_output(tmp_path / "x", "bank", config={}),
    ):
        pass


def test_a_killed_process_leaves_no_lock_to_its_workers(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from llm2clip import artifacts\n"
        "with artifacts.open_output(sys.argv[1], 'bank', config={}):\n"
        "    if not os.fork():\n"
        "        print(os.getpid(), flush=True)\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with artifacts.open_output(tmp_path / "x", "bank", config={}) as began:
                assert began
        finally:
            os.kill(worker, signal.SIGKILL)


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with (
        pytest.raises(UsageError, match="files of another program"),
        artifacts.open_output(tmp_path, "bank", config={}),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"), artifacts.open_output(tmp_path / "file", "bank", config={}):
        pass


def test_read_manifest_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        artifacts.read_manifest(tmp_path / "absent", "bank")
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        artifacts.read_manifest(tmp_path, "bank")
    artifacts.write_json(tmp_path / artifacts.RUN, {})
    with pytest.raises(ArtifactError, match="unfinished"):
        artifacts.read_manifest(tmp_path, "bank")
    artifacts.write_manifest(tmp_path, "student", config={})
    with pytest.raises(UsageError, match="holds a student, not a bank"):
        artifacts.read_manifest(tmp_path, "bank")
    (tmp_path / artifacts.MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        artifacts.read_manifest(tmp_path, "bank")
    newer = {"format": "llm2clip/bank", "format_version": artifacts.FORMAT_VERSION + 1}
    (tmp_path / artifacts.MANIFEST).write_text(json.dumps(newer))
    with pytest.raises(ArtifactError, match="has format 2"):
        artifacts.read_manifest(tmp_path, "bank")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), artifacts.atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert artifacts.read_json(tmp_path / "a.json") == 1


def test_a_name_that_is_no_utf8_survives_in_json(tmp_path: Path) -> None:
    settings = {"data": "b\udce9.tar", "caption": "圆 🙂"}
    with artifacts.open_output(tmp_path / "x", "bank", config=settings):
        artifacts.write_manifest(tmp_path / "x", "bank", config=settings)
    with artifacts.open_output(tmp_path / "x", "bank", config=settings) as began:
        assert began
    assert artifacts.read_manifest(tmp_path / "x", "bank")["config"] == settings
    assert "圆 🙂" in (tmp_path / "x" / "run.json").read_text(encoding="utf-8")
    assert artifacts.fingerprint(settings) != artifacts.fingerprint({**settings, "data": "b\udce8.tar"})


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with artifacts.open_output(tmp_path / "x", "bank", config={}) as began:
        assert not began
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["run.json"]
