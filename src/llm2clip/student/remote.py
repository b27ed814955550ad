"""Images in remote shards (tars behind hf:// s3:// https://): drawn shard by shard, each fetched to a local cache.

Nothing but `mix.open_order` knows of them. Each process has its own share (lane) of the shards, and draws its part of
each batch from it alone: in an epoch it takes its shards in random order, a window of them at a time, and mixes the
samples of a window freely. So the order is a pure function of the seed and the number of processes; a run that goes on
anywhere fetches the shards of its window again and reads on at the exact sample.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from llm2clip.bank.reader import Bank
from llm2clip.data.images import load_image
from llm2clip.data.sample import ImageRef
from llm2clip.data.urls import filesystem_of, is_url, url_errors
from llm2clip.errors import SourceError, UsageError
from llm2clip.student.order import Ints, Mixture, key_of, permuted

WINDOW = 8
"""Shards whose samples are mixed with each other."""
BLOCK = 8192
"""Draws among which several banks are interleaved; among an epoch's, all shards would be needed at once."""
CACHE_GIB = 64.0
"""Default size of the cache; it must hold two windows of shards for each process of a machine."""
KEEP_SECONDS = 60
"""A shard used so recently is not deleted; the cache rather grows."""
TRIES = 4
"""Attempts to fetch a shard, 1, 4 and 16 seconds apart."""


def shard_starts(bank: Bank) -> Ints | None:
    """The first sample of each shard and the end of the last, `[S + 1]`; None if images are local or lie singly."""
    if not is_url(bank.image(0).path):
        return None
    paths = bank.table.image_path
    starts = np.flatnonzero(np.diff(paths, prepend=-1))
    return None if len(starts) * 2 > len(paths) else np.append(starts, len(paths)).astype(np.int64)


class RemoteOrder:
    """The order of batches, as `order.Mixture` has it, of banks some of which lie in remote shards."""

    def __init__(
        self, banks: Sequence[Bank], *, weights: Sequence[float] | None, batch_size: int, seed: int, num_processes: int
    ) -> None:
        self.banks, self.weights, self.seed, self.lanes = banks, weights, seed, num_processes
        self.part, self.cache = batch_size // num_processes, ShardCache()
        starts = [shard_starts(bank) for bank in banks]
        window = min(WINDOW * int(np.diff(own).mean()) for own in starts if own is not None)
        self.ahead = -(-window // self.part)  # batches that a window lasts: so early its shards are fetched
        self.starts = [  # a local bank is cut into a piece a lane
            np.linspace(0, bank.num_samples, self.lanes + 1).astype(np.int64) if own is None else own
            for bank, own in zip(banks, starts, strict=True)
        ]
        self._mixtures: dict[int, Mixture] = {}
        self.orders = self._mixture(0).orders
        self.batches_per_epoch = sum(order.size for order in self.orders) // self.part

    def draw(self, batch: int, places: Ints) -> tuple[Ints, Ints]:
        """Banks and samples at places of a batch, see `Mixture.draw`; and fetch what will be needed there."""
        banks, samples = np.empty_like(places), np.empty_like(places)
        lanes, inside = np.divmod(places, self.part)
        for lane in np.unique(lanes).tolist():
            here, mixture = lanes == lane, self._mixture(lane)
            banks[here], samples[here] = mixture.draw(batch, inside[here])
            for bank, sample in zip(*mixture.draw(batch + self.ahead, inside[here]), strict=True):
                self.cache.fetch_ahead(self.banks[bank].image(int(sample)))
        return banks, samples

    def load_image(self, ref: ImageRef, *, min_size: int | None = None) -> Image.Image:
        """As `data.images.load_image`, from the local copy of the image's shard; SourceError if there is none."""
        return load_image(self.cache.local(ref), min_size=min_size)

    def _mixture(self, lane: int) -> Mixture:
        if lane not in self._mixtures:
            orders = [
                ShardOrder(starts, seed=self.seed, name=str(i), lane=lane, lanes=self.lanes)
                for i, starts in enumerate(self.starts)
            ]
            epoch = max(1, min(BLOCK, sum(order.size for order in orders)) // self.part) * self.part
            self._mixtures[lane] = Mixture(
                orders, weights=self.weights, batch_size=self.part, seed=self.seed, epoch=epoch, number=lane
            )
        return self._mixtures[lane]


class ShardOrder:
    """The order of a bank's samples in one of several lanes, shard by shard, for `order.Mixture`.

    An epoch is as long as the smallest lane's; of others a rest is left out, another one each epoch.
    """

    def __init__(
        self, starts: Ints, *, seed: int, name: str = "", lane: int = 0, lanes: int = 1, window: int = WINDOW
    ) -> None:
        self.starts, self.seed, self.name, self.lane, self.window = starts, seed, name, lane, window
        self.sizes = np.diff(starts)
        if len(self.sizes) < lanes:
            raise UsageError(
                f"{len(self.sizes)} remote shards cannot be shared by {lanes} processes; copy them to a local disk and "
                "build the bank from there, or start fewer processes"
            )
        shuffled = permuted(np.arange(len(self.sizes)), len(self.sizes), key_of("lanes", seed, name))
        self.shards = shuffled[lane::lanes]
        self.size = min(int(self.sizes[shuffled[other::lanes]].sum()) for other in range(lanes))

    def samples(self, draws: Ints) -> Ints:
        epochs, places = np.divmod(draws, self.size)
        out = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            shards, ends = _epoch(self, epoch)
            here = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(ends, places[here], side="right") // self.window
            for window in np.unique(windows).tolist():
                part = here[windows == window]
                first = int(ends[window * self.window - 1]) if window else 0
                last = int(ends[min((window + 1) * self.window, len(ends)) - 1])
                key = key_of("window", self.seed, self.name, epoch, self.lane, window)
                inside = first + permuted(places[part] - first, last - first, key)
                number = np.searchsorted(ends, inside, side="right")
                out[part] = self.starts[shards[number] + 1] - ends[number] + inside
        return out

    def substitute(self, sample: int, draw: float) -> int:
        """Another sample of the same shard."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return int(self.starts[shard] + int(draw * self.sizes[shard]))


@functools.lru_cache(maxsize=16)
def _epoch(order: ShardOrder, epoch: int) -> tuple[Ints, Ints]:
    """A lane's shards in the order of an epoch, and the draw with which each ends."""
    key, number = key_of("shards", order.seed, order.name, epoch, order.lane), len(order.shards)
    shuffled = order.shards[permuted(np.arange(number), number, key)]
    return shuffled, np.cumsum(order.sizes[shuffled])


class ShardCache:
    """Remote shards as local files, fetched when first read, the longest unused ones deleted to keep the size.

    Processes of one machine share it; each shard is fetched by one of them while the others wait.

    Args:
        folder: where; by default `$LLM2CLIP_SHARD_CACHE`, or `~/.cache/llm2clip/shards`.
        max_bytes: size; by default `$LLM2CLIP_SHARD_CACHE_GIB`, or 64 GiB; UsageError if that is no number.
    """

    def __init__(self, folder: str | Path | None = None, *, max_bytes: int | None = None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder or os.environ.get("LLM2CLIP_SHARD_CACHE") or Path(base) / "llm2clip" / "shards")
        size = os.environ.get("LLM2CLIP_SHARD_CACHE_GIB") or CACHE_GIB
        try:
            self.max_bytes = int(float(size) * 2**30) if max_bytes is None else max_bytes
        except ValueError:
            raise UsageError(f"LLM2CLIP_SHARD_CACHE_GIB is {size!r}; set it to a number of GiB, such as 64") from None
        self._started: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_started": set(), "_pool": None}

    def local(self, ref: ImageRef) -> ImageRef:
        """`ref` with its shard fetched; what is no part of a remote shard as it is."""
        return replace(ref, path=str(self.fetch(ref.path))) if _in_shard(ref) else ref

    def fetch_ahead(self, ref: ImageRef) -> None:
        """Fetch an image's shard in the background; what fails is tried again, and reported, when it is needed."""
        if _in_shard(ref) and ref.path not in self._started:
            self._started.add(ref.path)
            if not self.path(ref.path).exists():
                self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="shards")
                self._pool.submit(self.fetch, ref.path)

    def path(self, url: str) -> Path:
        """Where a shard lies once it is fetched."""
        return self.folder / (hashlib.sha256(url.encode()).hexdigest()[:24] + Path(url).suffix)

    def fetch(self, url: str) -> Path:
        """The local copy of a shard; SourceError if it cannot be fetched."""
        path = self.path(url)
        if _touch(path):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{path.name}.lock", thread_local=False).acquire()
        except OSError as error:
            raise UsageError(
                f"the shard cache {self.folder} cannot be written ({error.strerror}); set LLM2CLIP_SHARD_CACHE to a "
                "folder that can"
            ) from None
        with lock:
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
                    reason = str(error) or type(error).__name__
                    raise SourceError(f"the shard {url} cannot be fetched: {reason}") from None
                time.sleep(4.0**attempt)
        self._make_room(temporary.stat().st_size)
        os.replace(temporary, path)

    def _make_room(self, needed: int) -> None:
        files = []
        for path in self.folder.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = needed + sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            if total <= self.max_bytes or used > time.time() - KEEP_SECONDS:
                break
            path.unlink(missing_ok=True)
            self._started.clear()
            total -= size


def _in_shard(ref: ImageRef) -> bool:
    return is_url(ref.path) and (ref.length >= 0 or bool(ref.column))


def _touch(path: Path) -> bool:
    """Whether a file is there; if so, it counts as just used."""
    try:
        os.utime(path)
    except PermissionError:
        return True  # another user's, who keeps it fresh
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
