"""Artifact folders: written under a lock, file by file through a rename, `manifest.json` last.

A folder holds `run.json` from the first moment (the resolved configuration of the run) and `manifest.json`
only once everything else is whole. So a folder without a manifest is unfinished, and the same command goes on
where it stopped; other settings are refused, naming what differs, unless nothing has come of the earlier run yet.
A manifest holds no time of day and no absolute path of the folder itself: two runs that do the same thing write the
same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import logging
import os
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from llm2clip.errors import ArtifactError, LLM2CLIPError, UsageError, setting
from llm2clip.same_settings import as_given, differing, named

logger = logging.getLogger("llm2clip")
MANIFEST = "manifest.json"
RUN = "run.json"
LOCK, ALIVE = ".lock", ".alive-"
"""The lock of a folder, and the beginning of the names of those that processes sharing it hold as long as they run."""
BEGIN_SECONDS = 10.0
"""How long a process waits for others that are just beginning on a folder it shares with them."""
FORMAT_VERSIONS = {"bank": 2}
"""Of kinds of artifact that have changed since version 1."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def json_bytes(text: str) -> bytes:
    r"""JSON in UTF-8; what UTF-8 cannot hold (a file name that is none is half a surrogate pair) as JSON's own escape.

    >>> json.loads(json_bytes('["b\udce9.jpg"]'))
    ['b\udce9.jpg']
    """
    return text.encode("utf-8", "backslashreplace")


def fingerprint(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of `value` as canonical JSON.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json_bytes(canonical_json(value))).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, after an fsync.

    The temporary name is fixed (`.NAME.tmp`), so what a killed run left is overwritten, not collected.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Have a file's bytes on the disk before it is given its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def one_line_disk_errors(path: Path) -> Iterator[None]:
    """Say in one line that the disk is full, and that nothing is lost.

    Raises:
        LLM2CLIPError: instead of the system's error for a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise LLM2CLIPError(
            f"no space left on the disk of {path}: free some and type the same command, it goes on where it stopped"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(indented_json(value))


def indented_json(value: Any) -> bytes:
    """`value` as the content of a JSON file."""
    return json_bytes(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`.

    Raises:
        ArtifactError: if the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it or its folder and make it again") from None


def write_manifest(folder: Path, kind: str, *, config: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Write `folder/manifest.json`, the last file of an artifact, and return its content (see `manifest_of`)."""
    manifest = manifest_of(kind, config=config, **facts)
    write_json(folder / MANIFEST, manifest)
    return manifest


def manifest_of(kind: str, *, config: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """The content of a manifest.

    Args:
        kind: what the folder is: "teacher", "bank", "student", "report", "export", "demo".
        config: the resolved configuration of the run.
        facts: whatever a reader needs: shapes, dtypes, counts, `fingerprint`.
    """
    from llm2clip import __version__

    return {
        "format": f"llm2clip/{kind}",
        "format_version": FORMAT_VERSIONS.get(kind, 1),
        "llm2clip_version": __version__,
        **facts,
        "config": dict(config),
    }


def read_manifest(folder: str | Path, kind: str) -> dict[str, Any]:
    """The manifest of a whole artifact of `kind`.

    Raises:
        UsageError: if `folder` does not exist or is another kind of artifact.
        ArtifactError: if it is unfinished, damaged or of a format that this version does not read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; expected a {kind} made by llm2clip")
    check_finished(folder, folder)
    if not (folder / MANIFEST).exists():
        raise UsageError(f"{folder} is no {kind}: it holds no {MANIFEST}")
    manifest = read_json(folder / MANIFEST)
    found = made_as(manifest) if isinstance(manifest, dict) else ""
    if found != kind:
        raise UsageError(f"{folder} holds a {found or 'folder of another program'}, not a {kind}")
    version, wanted = manifest.get("format_version", 0), FORMAT_VERSIONS.get(kind, 1)
    if version > wanted:
        raise ArtifactError(f"{folder} has format {version}; this llm2clip reads up to {wanted}, upgrade")
    if kind in FORMAT_VERSIONS and version < wanted:
        raise ArtifactError(
            f"{folder}: this {kind} was made by an older version (format {version}, now {wanted}): build it again in a "
            "new folder, by the command that made it"
        )
    return manifest


def made_as(manifest: Mapping[str, Any]) -> str:
    """What kind of artifact a manifest is of: "teacher", "bank", ...; "" if it is none of llm2clip.

    >>> made_as({"format": "llm2clip/bank"}), made_as({})
    ('bank', '')
    """
    return str(manifest.get("format", "")).removeprefix("llm2clip/")


def check_name(name: str, *, what: str = "") -> None:
    """Raise if the name of a model is neither a folder nor can be a Hub id.

    Args:
        name: as it was given.
        what: the setting that has it, for the message.

    Raises:
        UsageError: with what to give.
    """
    is_path = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip()
    if is_path and not (name.strip() and Path(name).is_dir()):
        given = f"{what} {name or repr(name)}".lstrip()
        raise UsageError(f"{given} is no folder; give the folder of a model, or a Hub id (org/name)")


def is_output(folder: str | Path) -> bool:
    """Whether a run of llm2clip began in `folder`, so that what lies there is no source of another.

    `run.json` alone does not say so: other programs have one, too.
    """
    path = Path(folder) / RUN
    try:
        return path.is_file() and set(read_json(path)) == {"kind", "config"}
    except ArtifactError:
        return False


def check_finished(folder: Path, name: str | Path) -> None:
    """Raise if a run began in `folder` and has not ended.

    Raises:
        ArtifactError: saying what to do, of `name`.
    """
    if (folder / RUN).exists() and not is_complete(folder):
        raise ArtifactError(f"{name} is unfinished: run the command that makes it again, it goes on where it stopped")


@contextlib.contextmanager
def open_output(
    folder: str | Path, kind: str, *, config: Mapping[str, Any], shared: bool = False, scraps: Sequence[str] = ()
) -> Iterator[bool]:
    """Hold `folder` for writing an artifact of `kind`; yields whether a run of the same settings began in it before.

    The folder is created, locked against other processes while the block runs, and `run.json` is written. If the block
    fails before it wrote anything, all of that is taken back, so that the corrected command may have the folder; so it
    may if a killed run left nothing but `run.json` and `scraps`. A folder that holds anything this function did not
    begin is never touched.

    Args:
        config: the settings that decide what is written. Leave out what only changes speed (workers, device).
        shared: lock the folder only while `run.json` is read or written, so that several processes with the same
            settings can fill it at once. They must agree among themselves who writes what, and since another may be at
            work, a block that fails takes nothing back.
        scraps: patterns of names of what a run writes before it has any result; with other settings they are removed.

    Raises:
        UsageError: if a living process uses the folder, it holds something else, or was begun with other settings
            (named).
    """
    folder, out = Path(folder), setting("out")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{out} {folder} is a file; name a folder")
    # in this order: another process may be beginning here, and it writes run.json first
    if folder.is_dir() and any(_is_foreign(path) for path in folder.iterdir()) and not (folder / RUN).exists():
        raise UsageError(f"{out} {folder} holds files of another program; name a new folder")
    made, failed = not folder.is_dir(), False
    lock = try_lock(folder / LOCK, seconds=BEGIN_SECONDS if shared else 0.2)  # or until another has just ended
    alive = None
    if lock is None:
        raise UsageError(f"{out} {folder} is in use by another process; wait for it or name another folder")
    try:
        began = _check_same_run(folder, kind, config, scraps)
        if not began:
            write_json(folder / RUN, {"kind": kind, "config": dict(config)})
        if shared:
            alive = try_lock(folder / f"{ALIVE}{uuid.uuid4().hex}")
            unlock(lock)
        try:
            yield began
        except BaseException:
            failed = True
            raise
    finally:
        if failed and lock.is_locked:  # not if it is shared, nor in a child that was forked in the block
            forget_unused(folder)
        for held in filter(None, [alive, lock]):
            unlock(held)
        if failed and made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def forget_unused(folder: Path) -> None:
    """Remove `run.json` if its run wrote nothing else. Only who holds the folder may call it."""
    if not any(_is_foreign(path) for path in folder.glob("*") if path.name != RUN):
        (folder / RUN).unlink(missing_ok=True)


def _is_foreign(path: Path) -> bool:
    return path.name != LOCK and not path.name.startswith((f".{RUN}.", ALIVE))


def _others_alive(folder: Path) -> bool:
    """Whether a process that shares the folder is at work in it; the locks that killed ones left are removed."""
    locks = [try_lock(path) for path in folder.glob(f"{ALIVE}*")]
    for lock in filter(None, locks):
        unlock(lock)
    return None in locks


def try_lock(path: Path, *, seconds: float = 0.0) -> BaseFileLock | None:
    """The lock on `path`, or None if another has it for that long; file and folder are made.

    It ends with this process, however that ends: a forked child does not keep it. Any thread may call `unlock`.

    Raises:
        UsageError: if the file system refuses to lock.
    """
    lock = FileLock(path, thread_local=False)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=seconds)
        except Timeout:
            return None
        except (FileExistsError, FileNotFoundError):  # another made or removed the folder at the same moment
            if path.parent.is_file() or path.parent.is_symlink():
                raise
            continue
        except OSError as error:
            if error.filename is not None:
                raise
            raise UsageError(f"{path.parent} cannot be locked ({error.strerror}); name a folder elsewhere") from None
        return lock


def unlock(lock: BaseFileLock) -> None:
    """Remove the file of a lock and give it up; who waits for it sees that the file is gone, and makes it anew."""
    if not lock.is_locked:  # given up before, or in a forked child, which never had it
        return
    with contextlib.suppress(OSError):  # Windows removes no file that is open; the lock itself does it there
        os.unlink(lock.lock_file)
    lock.release()


def is_complete(folder: str | Path) -> bool:
    """Whether an artifact folder is whole: its manifest, written last, is there."""
    return (Path(folder) / MANIFEST).exists()


def say_complete(folder: str | Path) -> None:
    """Log that an artifact is there already, and how to make another, say of other data."""
    logger.info("%s is already complete; to make it anew, remove it or give another %s", folder, setting("out"))


def _check_same_run(folder: Path, kind: str, config: Mapping[str, Any], scraps: Sequence[str]) -> bool:
    """Whether a run of these settings began in a folder; what another left there without a result is removed.

    Raises:
        UsageError: if another began, and came to something or is at work.
    """
    others = _others_alive(folder)
    if not (folder / RUN).exists():
        return False
    earlier = read_json(folder / RUN)
    before, now = earlier.get("config", {}), json.loads(canonical_json(dict(config)))
    changed = differing(before, now)
    if earlier.get("kind") == kind and not changed:
        return True
    left = [path for path in folder.iterdir() if _is_foreign(path) and path.name != RUN]
    if not others and all(any(fnmatch.fnmatch(path.name, scrap) for scrap in scraps) for path in left):
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        logger.info("%s: an earlier run with other settings had come to no result; begun anew", folder)
        return False
    out = setting("out")
    if earlier.get("kind") != kind:
        raise UsageError(f"{out} {folder} holds a {earlier.get('kind')}, made or begun there; name a new folder")
    if others:
        what = f"is in use by another process with other settings: {named(before, now, changed)}"
        raise UsageError(f"{out} {folder} {what}; name a new folder")
    go_on = as_given(before, changed) or f"the settings of {folder / RUN}"
    raise UsageError(
        f"{out} {folder} was begun with other settings: {named(before, now, changed)}; to go on give {go_on}; to "
        f"begin anew name another {out}, or delete this one: rm -r {shlex.quote(str(folder))}"
    )
