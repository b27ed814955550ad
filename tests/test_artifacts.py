"""Artifact folders: manifest last, locked, resumed with the same settings only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from llm2clip import artifacts
from llm2clip.errors import ArtifactError, LLM2CLIPError, UsageError, settings_as_flags

from .forking import end_of, fork


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    with artifacts.open_output(folder, "bank", config={"seed": 1}) as began:
        assert not began and not artifacts.is_complete(folder)
        artifacts.write_manifest(folder, "bank", config={"seed": 1}, rows=3)
    assert artifacts.read_manifest(folder, "bank")["rows"] == 3
    with artifacts.open_output(folder, "bank", config={"seed": 1}) as began:
        assert began and artifacts.is_complete(folder)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    begin(tmp_path / "x", seed=1, dtype="float16")
    with (
        pytest.raises(UsageError, match="seed was 1, now 2; to go on give seed=1; to begin anew name another out, or "),
        artifacts.open_output(tmp_path / "x", "bank", config={"seed": 2, "dtype": "float16"}),
    ):
        pass


def fail_in(folder: Path, *, write: str = "", **options: Any) -> None:
    """A run that stops with an error, perhaps after it has written a file."""
    with pytest.raises(ZeroDivisionError), artifacts.open_output(folder, "bank", config={}, **options):
        if write:
            (folder / write).write_text("")
        raise ZeroDivisionError


def test_a_run_that_fails_before_it_wrote_anything_leaves_nothing(tmp_path: Path) -> None:
    fail_in(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    fail_in(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir()), "a folder that was there stays"
    with artifacts.open_output(tmp_path / "mine", "student", config={"seed": 1}) as began:
        assert not began


def test_a_run_that_fails_later_can_go_on(tmp_path: Path) -> None:
    fail_in(tmp_path / "x", write="table")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["run.json", "table"]
    fail_in(tmp_path / "x")
    with artifacts.open_output(tmp_path / "x", "bank", config={}) as began:
        assert began


def test_a_refused_run_does_not_take_the_folder_of_another(tmp_path: Path) -> None:
    begin(tmp_path / "x", seed=1)
    for kind, seed, message in (("bank", 2, "was begun with other settings"), ("student", 1, "holds a bank, made or")):
        with (
            pytest.raises(UsageError, match=message) as refused,
            artifacts.open_output(tmp_path / "x", kind, config={"seed": seed}),
        ):
            pass
        assert "in use" not in str(refused.value), "which is said of living processes alone"
        assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["run.json", "table"]


def begin(folder: Path, *, write: str = "table", kind: str = "bank", **config: Any) -> None:
    """A run that is over and wrote something."""
    with artifacts.open_output(folder, kind, config=config):
        (folder / write).write_text("")


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
    for damage in (b"{", b'"\xff"'):
        (tmp_path / artifacts.MANIFEST).write_bytes(damage)
        with pytest.raises(ArtifactError, match="damaged"):
            artifacts.read_manifest(tmp_path, "bank")
    newer = {"format": "llm2clip/bank", "format_version": artifacts.FORMAT_VERSIONS["bank"] + 1}
    (tmp_path / artifacts.MANIFEST).write_text(json.dumps(newer))
    with pytest.raises(ArtifactError, match="has format 3"):
        artifacts.read_manifest(tmp_path, "bank")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), artifacts.atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert artifacts.read_json(tmp_path / "a.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_and_leaves_nothing(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(LLM2CLIPError, match=r"no space left .* type the same command"),
        artifacts.one_line_disk_errors(tmp_path),
    ):
        artifacts.write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_disk_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), artifacts.one_line_disk_errors(tmp_path):
        artifacts.write_json(tmp_path / "absent" / "a.json", {})


def test_a_name_that_is_no_utf8_survives_in_json(tmp_path: Path) -> None:
    settings = {"data": "b\udce9.tar", "caption": "圆 🙂"}
    with artifacts.open_output(tmp_path / "x", "bank", config=settings):
        artifacts.write_manifest(tmp_path / "x", "bank", config=settings)
    with artifacts.open_output(tmp_path / "x", "bank", config=settings) as began:
        assert began
    assert artifacts.read_manifest(tmp_path / "x", "bank")["config"] == settings
    assert "圆 🙂" in (tmp_path / "x" / "run.json").read_text(encoding="utf-8")
    assert artifacts.fingerprint(settings) != artifacts.fingerprint({**settings, "data": "b\udce8.tar"})


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 2**21 + 7])
def test_the_digest_is_of_the_whole_file(tmp_path: Path, size: int) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "x").write_bytes(data)
    assert artifacts.file_digest(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_fingerprint_by_hand() -> None:
    by_hand = hashlib.sha256('{"a":[1,"圆"],"b":null}'.encode()).hexdigest()[:16]
    assert artifacts.fingerprint({"b": None, "a": (1, "圆")}) == artifacts.fingerprint({"a": [1, "圆"], "b": None})
    assert artifacts.fingerprint({"b": None, "a": [1, "圆"]}) == by_hand


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, renames: dict[str, list[str]]) -> None:
    artifacts.write_json(tmp_path / "a.json", [1])
    artifacts.write_manifest(tmp_path, "bank", config={})
    assert renames == {"a.json": [], "manifest.json": []}


def test_a_setting_that_is_gone_is_named(tmp_path: Path) -> None:
    begin(tmp_path / "x", old=3, seed=1)
    with (
        pytest.raises(UsageError, match="old was 3, now None"),
        artifacts.open_output(tmp_path / "x", "bank", config={"seed": 1}),
    ):
        pass


def test_a_shared_run_that_fails_takes_nothing_from_the_others(tmp_path: Path) -> None:
    with artifacts.open_output(tmp_path / "x", "bank", config={}, shared=True):
        fail_in(tmp_path / "x", shared=True)
        assert [path.name for path in (tmp_path / "x").iterdir() if "alive" not in path.name] == ["run.json"]
    with artifacts.open_output(tmp_path / "x", "bank", config={}, shared=True) as began:
        assert began


def test_of_two_that_begin_at_once_the_second_must_have_the_settings_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json = artifacts.write_json

    def share(seed: int) -> None:
        with artifacts.open_output(tmp_path / "x", "bank", config={"seed": seed}, shared=True):
            (tmp_path / "x" / "table").touch()

    def slow(path: Path, value: Any) -> None:
        monkeypatch.undo()
        others.append(pool.submit(share, 2))
        assert not wait(others, timeout=0.3).done, "it waits for the first to have begun"
        write_json(path, value)

    others: list[Future[None]] = []
    monkeypatch.setattr(artifacts, "write_json", slow)
    with ThreadPoolExecutor(1) as pool:
        share(1)
        with pytest.raises(UsageError, match="seed was 1, now 2"):
            others[0].result(60)


def test_who_shares_a_folder_waits_for_others_to_begin_but_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "BEGIN_SECONDS", 0.1)
    with (
        artifacts.open_output(tmp_path / "x", "bank", config={}),
        pytest.raises(UsageError, match="in use by another process"),
        artifacts.open_output(tmp_path / "x", "bank", config={}, shared=True),
    ):
        pass


def test_a_forked_child_that_fails_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    held = artifacts.open_output(tmp_path / "x", "bank", config={})
    held.__enter__()
    child = fork(lambda: held.__exit__(ZeroDivisionError, ZeroDivisionError(), None))
    assert end_of(child) == 0
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [".lock", "run.json"]
    fail_to_open(tmp_path / "x")
    held.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["run.json"]


def fail_to_open(folder: Path) -> None:
    with (
        pytest.raises(UsageError, match="in use by another process"),
        artifacts.open_output(folder, "bank", config={}),
    ):
        pass


def test_no_two_hold_a_lock_whose_file_comes_and_goes(tmp_path: Path) -> None:
    """Each holder removes the file, at which the others have opened it already."""

    def work() -> None:
        for _ in range(100):
            while (lock := artifacts.try_lock(tmp_path / "locks" / "lock")) is None:
                pass
            (tmp_path / "held").touch(exist_ok=False)
            (tmp_path / "held").unlink()
            artifacts.unlock(lock)
            with contextlib.suppress(OSError):
                (tmp_path / "locks").rmdir()

    assert [end_of(child) for child in [fork(work) for _ in range(4)]] == [0] * 4
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_flock_has_locks_by_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="falling back to SoftFileLock"):
        for _ in range(2):
            with artifacts.open_output(tmp_path / "x", "bank", config={}):
                fail_to_open(tmp_path / "x")
            assert [path.name for path in (tmp_path / "x").iterdir()] == ["run.json"]
        fail_in(tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_file_system_that_refuses_to_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        pytest.raises(UsageError, match=r"x cannot be locked \(No locks available\); name a folder elsewhere"),
        artifacts.open_output(tmp_path / "x", "bank", config={}),
    ):
        pass


SCRAPS = ("teacher.json", ".*.tmp")


@pytest.mark.parametrize("left", [(), ("teacher.json",), (".table.tmp", "teacher.json")])
@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_without_a_result_is_taken_over(
    tmp_path: Path, left: tuple[str, ...], shared: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As a kill leaves it, with what a run writes before its first result."""
    folder = tmp_path / "x"
    folder.mkdir()
    artifacts.write_json(folder / "run.json", {"kind": "bank", "config": {"seed": 1}})
    for name in left:
        (folder / name).mkdir() if name.startswith(".") else (folder / name).touch()
    caplog.set_level("INFO", "llm2clip")
    options: dict[str, Any] = {"config": {"seed": 2}, "shared": shared, "scraps": SCRAPS}
    with artifacts.open_output(folder, "bank", **options) as began:
        assert not began
        assert [path.name for path in folder.iterdir() if not path.name.startswith((".lock", ".alive"))] == ["run.json"]
    assert artifacts.read_json(folder / "run.json")["config"] == {"seed": 2}
    assert caplog.messages == [f"{folder}: an earlier run with other settings had come to no result; begun anew"]


@pytest.mark.parametrize("name", ["table", "manifest.json", "teacher.json.gz"])
def test_a_folder_with_a_result_is_not(tmp_path: Path, name: str) -> None:
    begin(tmp_path / "x", write=name, seed=1)
    with (
        pytest.raises(UsageError, match="seed was 1, now 2"),
        artifacts.open_output(tmp_path / "x", "bank", config={"seed": 2}, scraps=SCRAPS),
    ):
        pass
    assert (tmp_path / "x" / name).exists()


def test_no_folder_is_taken_from_a_living_process_that_shares_it(tmp_path: Path) -> None:
    with (
        artifacts.open_output(tmp_path / "x", "bank", config={"seed": 1}, shared=True),
        pytest.raises(UsageError, match="x is in use by another process with other settings: seed was 1, now 2"),
        artifacts.open_output(tmp_path / "x", "bank", config={"seed": 2}, shared=True),
    ):
        pass
    with artifacts.open_output(tmp_path / "x", "bank", config={"seed": 2}, shared=True) as began:
        assert not began, "now that it is gone"


def test_what_a_killed_process_held_of_a_shared_folder_is_free(tmp_path: Path) -> None:
    def share() -> None:
        with artifacts.open_output(tmp_path / "x", "bank", config={"seed": 1}, shared=True):
            os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(fork(share)) != 0
    assert len(list((tmp_path / "x").glob(".alive-*"))) == 1
    with artifacts.open_output(tmp_path / "x", "bank", config={"seed": 2}) as began:
        assert not began
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"data": ["a.csv", "b/c.csv"]}, {"data": ["./a.csv", "{here}/b//c.csv"]}),
        ({"tower": "{here}/tower"}, {"tower": Path("tower")}),
        ({"bank": ["bank/"]}, {"bank": ("bank",)}),
        ({"data": ["shards/{{0..3}}.tar"]}, {"data": ["./shards/{{0..3}}.tar"]}),
        ({"epochs": 1}, {"epochs": 1.0}),
        ({"mix": {"short": 1.0}}, {"mix": {"short": 1}}),
        ({"seed": 0}, {"seed": 0, "image_root": None}),
        ({"seed": 0}, {"seed": 0, "views": {}}),
    ],
)
def test_settings_that_mean_the_same_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], now: dict[str, Any]
) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [placed(item) for item in value]
        return str(value).format(here=tmp_path) if isinstance(value, (str, Path)) else value

    monkeypatch.chdir(tmp_path)
    begin(Path("x"), **{name: placed(value) for name, value in before.items()})
    with artifacts.open_output("x", "bank", config={name: placed(value) for name, value in now.items()}) as began:
        assert began


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"data": ["a.csv"]}, {"data": ["b.csv"]}),
        ({"data": ["https://host/a//b.csv"]}, {"data": ["https://host/a/b.csv"]}),
        ({"caption_instruction": "./a"}, {"caption_instruction": "a"}),
        ({"data": ["a.csv", "b.csv"]}, {"data": ["b.csv", "a.csv"]}),
    ],
)
def test_settings_that_mean_something_else_are_not(tmp_path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    begin(tmp_path / "x", **before)
    with (
        pytest.raises(UsageError, match="was begun with other settings"),
        artifacts.open_output(tmp_path / "x", "bank", config=now),
    ):
        pass


def test_what_differs_is_named_as_flags_with_what_goes_on_and_what_begins_anew(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    begin(folder, data=["a b.csv", "c.csv"], split=None, mask=True, steps=4)
    with (
        settings_as_flags(),
        pytest.raises(UsageError) as refused,
        artifacts.open_output(folder, "bank", config={"data": ["c.csv"], "split": "train", "mask": False, "steps": 4}),
    ):
        pass
    assert str(refused.value) == (
        f"--out {folder} was begun with other settings: data was ['a b.csv', 'c.csv'], now ['c.csv'], mask was True, "
        "now False, split was None, now 'train'; to go on give --data 'a b.csv' c.csv --mask no --split; to begin "
        f"anew name another --out, or delete this one: rm -r '{folder}'"
    )


def test_of_many_that_differ_three_are_named(tmp_path: Path) -> None:
    begin(tmp_path / "x", a=1, b=1, c=1, d=1, e=1)
    with pytest.raises(UsageError) as refused, artifacts.open_output(tmp_path / "x", "bank", config={}):
        pass
    told = f"c was 1, now None, and 2 more; to go on give the settings of {tmp_path / 'x' / 'run.json'}; to begin"
    assert told in str(refused.value)
