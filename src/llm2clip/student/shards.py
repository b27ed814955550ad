"""Pictures in remote shards (tars behind hf:// s3:// https://): drawn shard by shard, each fetched to a local cache.

Each process (lane) has its own share of the shards. In an epoch it takes them in random order, a window of them at a
time, and mixes the samples of a window freely. So the order is a pure function of the seed, the epoch and the number of
processes; a run that goes on anywhere fetches the shards of its window again and reads on at the exact sample.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from llm2clip.bank.reader import Bank
from llm2clip.data.sample import PictureRef
from llm2clip.data.urls import filesystem_of, is_url, url_errors
from llm2clip.errors import SourceError, UsageError
from llm2clip.student.order import Ints, key_of, permuted

WINDOW = 8
"""Shards whose samples are mixed with each other."""
SHARD_BLOCK = 8192
"""Draws among which several banks are interleaved when one lies in remote shards, see `order.Mixture`."""
CACHE_GIB = 64.0
"""Default size of the cache; it must hold two windows of shards for each process of a machine."""
KEEP_SECONDS = 60
"""A shard used so recently is not deleted; the cache rather grows."""
TRIES = 4
"""Attempts to fetch a shard, 1, 4 and 16 seconds apart."""


def shard_starts(bank: Bank) -> Ints | None:
    """The first sample of each shard and the end of the last, `[S + 1]`; None if pictures are local or lie singly."""
    if not is_url(bank.picture(0).path):
        return None
    paths = bank.table.picture_path
    starts = np.flatnonzero(np.diff(paths, prepend=-1))
    if len(starts) * 2 > len(paths):
        return None
    return np.append(starts, len(paths)).astype(np.int64)


class ShardOrder:
    """Samples shard by shard, for `order.Mixture`.

    A lane's epoch has as many draws as the smallest lane has samples; what the others have more is left out, each epoch
    something else.

    Args:
        starts: first sample of each shard, and the end of the last `[S + 1]`.
        seed: source of the order.
        name: tells apart the banks of one run.
        window: shards mixed with each other.
    """

    def __init__(self, starts: Ints, *, seed: int, name: str = "", window: int = WINDOW) -> None:
        self.starts, self.seed, self.name, self.window = starts, seed, name, window
        self.sizes = np.diff(starts)

    def lane_shards(self, lane: int, lanes: int) -> Ints:
        """The shards of a lane.

        Raises:
            UsageError: if there are fewer shards than lanes.
        """
        if len(self.sizes) < lanes:
            raise UsageError(
                f"{len(self.sizes)} remote shards cannot be shared by {lanes} processes; copy them to a local disk and "
                "build the bank from there, or start fewer processes"
            )
        return permuted(np.arange(len(self.sizes)), len(self.sizes), key_of("lanes", self.seed, self.name))[lane::lanes]

    def lane_size(self, lanes: int) -> int:
        return _lane_size(self, lanes)

    def samples(self, draws: Ints, *, lane: int, lanes: int) -> Ints:
        epochs, places = np.divmod(draws, self.lane_size(lanes))
        out = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            shards, ends = _epoch(self, epoch, lane, lanes)
            here = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(ends, places[here], side="right") // self.window
            for window in np.unique(windows).tolist():
                part = here[windows == window]
                first, last = self._span(ends, window)
                key = key_of("window", self.seed, self.name, epoch, lane, window)
                inside = first + permuted(places[part] - first, last - first, key)
                number = np.searchsorted(ends, inside, side="right")
                shard = shards[number]
                out[part] = self.starts[shard] + inside - (ends[number] - self.sizes[shard])
        return out

    def substitute(self, sample: int, draw: float) -> int:
        """Another sample of the same shard."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return int(self.starts[shard] + int(draw * self.sizes[shard]))

    def upcoming(self, draw: int, *, lane: int, lanes: int) -> list[int]:
        """A sample of each shard that a lane reads in the window of `draw` and in the one after it."""
        epoch, place = divmod(draw, self.lane_size(lanes))
        shards, ends = _epoch(self, epoch, lane, lanes)
        window = int(np.searchsorted(ends, place, side="right")) // self.window
        coming = shards[window * self.window : (window + 2) * self.window]
        if len(coming) < 2 * self.window:
            coming = np.append(coming, _epoch(self, epoch + 1, lane, lanes)[0][: self.window])
        return [int(self.starts[shard]) for shard in coming.tolist()]

    def _span(self, ends: Ints, window: int) -> tuple[int, int]:
        """First and last draw of a window in its epoch."""
        last = min((window + 1) * self.window, len(ends))
        return (int(ends[window * self.window - 1]) if window else 0), int(ends[last - 1])


@functools.lru_cache(maxsize=8)
def _lane_size(order: ShardOrder, lanes: int) -> int:
    return min(int(order.sizes[order.lane_shards(lane, lanes)].sum()) for lane in range(lanes))


@functools.lru_cache(maxsize=16)
def _epoch(order: ShardOrder, epoch: int, lane: int, lanes: int) -> tuple[Ints, Ints]:
    """A lane's shards in the order of an epoch, and the draw with which each ends."""
    shards = order.lane_shards(lane, lanes)
    shuffled = shards[
        permuted(np.arange(len(shards)), len(shards), key_of("shards", order.seed, order.name, epoch, lane))
    ]
    return shuffled, np.cumsum(order.sizes[shuffled])


class ShardCache:
    """Remote shards as local files, fetched when first read, the longest unused ones deleted to keep the size.

    Processes of one machine share it; each shard is fetched by one of them while the others wait.

    Args:
        folder: where; by default `$LLM2CLIP_SHARD_CACHE`, or `~/.cache/llm2clip/shards`.
        max_bytes: size; by default `$LLM2CLIP_SHARD_CACHE_GIB`, or 64 GiB.

    Raises:
        UsageError: if the environment's size is no number.
    """

    def __init__(self, folder: str | Path | None = None, *, max_bytes: int | None = None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        default = Path(base) / "llm2clip" / "shards"
        self.folder = Path(folder or os.environ.get("LLM2CLIP_SHARD_CACHE") or default)
        size = os.environ.get("LLM2CLIP_SHARD_CACHE_GIB") or CACHE_GIB
        try:
            self.max_bytes = int(float(size) * 2**30) if max_bytes is None else max_bytes
        except ValueError:
            raise UsageError(f"LLM2CLIP_SHARD_CACHE_GIB is {size!r}; set it to a number of GiB, such as 64") from None
        self._started: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "max_bytes": self.max_bytes, "_started": set(), "_pool": None}

    def local(self, ref: PictureRef) -> PictureRef:
        """`ref` with its shard fetched; one that is no part of a remote shard stays as it is.

        Raises:
            SourceError: if the shard cannot be fetched.
        """
        if not is_url(ref.path) or (ref.length < 0 and not ref.column):
            return ref
        return replace(ref, path=str(self.fetch(ref.path)))

    def fetch_ahead(self, urls: list[str]) -> None:
        """Fetch shards in the background; what fails is tried again, and reported, when it is needed."""
        for url in urls:
            if url not in self._started and not self.path(url).exists():
                self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="shards")
                self._pool.submit(self.fetch, url)
            self._started.add(url)

    def path(self, url: str) -> Path:
        """Where a shard lies once it is fetched."""
        return self.folder / (hashlib.sha256(url.encode()).hexdigest()[:24] + Path(url).suffix)

    def fetch(self, url: str) -> Path:
        """The local copy of a shard.

        Raises:
            SourceError: if it cannot be fetched.
        """
        path = self.path(url)
        if not _touch(path):
            with self._lock(path):
                if not _touch(path):
                    self._download(url, path)
        return path

    def _download(self, url: str, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        for attempt in range(TRIES):
            try:
                filesystem, remote = filesystem_of(url)
                filesystem.get_file(remote, str(temporary))
                break
            except url_errors() as error:
                if attempt == TRIES - 1 or isinstance(error, FileNotFoundError | ImportError | ValueError):
                    raise SourceError(
                        f"the shard {url} cannot be fetched: {str(error) or type(error).__name__}"
                    ) from None
                time.sleep(4.0**attempt)
        self._make_room(temporary.stat().st_size)
        os.replace(temporary, path)

    def _make_room(self, needed: int) -> None:
        files = []
        for path in self.folder.glob("[!.]*"):
            try:
                files.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process was faster
                continue
        total = needed + sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            if total <= self.max_bytes or used > time.time() - KEEP_SECONDS:
                break
            path.unlink(missing_ok=True)
            self._started.clear()
            total -= size

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = FileLock(self.folder / f".{path.name}.lock", thread_local=False).acquire()
        except OSError as error:
            raise UsageError(
                f"the shard cache {self.folder} cannot be written ({error.strerror}); set LLM2CLIP_SHARD_CACHE to a "
                "folder that can"
            ) from None
        with held:
            yield


def _touch(path: Path) -> bool:
    """Whether a file is there; if so, it counts as just used."""
    try:
        os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:  # another user's, who keeps it fresh
        return True
    return True
