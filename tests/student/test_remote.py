"""Remote shards are drawn a window at a time, fetched once, kept within bounds, and read like local images."""

from __future__ import annotations

import functools
import io
import os
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from llm2clip.bank.reader import Bank
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import SourceError, UsageError
from llm2clip.student import remote as remote_module
from llm2clip.student.data import BankDataset, Batch
from llm2clip.student.loader import BankLoader
from llm2clip.student.mix import open_order
from llm2clip.student.order import Mixture
from llm2clip.student.remote import RemoteOrder, ShardCache, ShardOrder, shard_starts

from .banks import colour, image_samples, write_test_bank
from .test_data import TRANSFORM, equal

STARTS = np.array([0, 4, 9, 12, 20, 23, 30, 31, 40])


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_an_epoch_reads_each_lanes_own_shards_once(lanes: int) -> None:
    orders = [ShardOrder(STARTS, seed=1, window=2, lane=lane, lanes=lanes) for lane in range(lanes)]
    size = orders[0].size
    for epoch in range(3):
        seen = []
        for order in orders:
            samples = order.samples(np.arange(epoch * size, (epoch + 1) * size))
            assert order.size == size == len(set(samples.tolist()))
            shards = set((np.searchsorted(STARTS, samples, side="right") - 1).tolist())
            assert shards <= set(order.shards.tolist())
            seen += samples.tolist()
        assert len(set(seen)) == len(seen)
    if lanes == 1:
        assert sorted(seen) == list(range(40))


def test_draws_stay_in_their_window() -> None:
    samples = ShardOrder(STARTS, seed=1, window=2).samples(np.arange(80))
    shards = np.searchsorted(STARTS, samples, side="right") - 1
    for epoch in range(2):
        windows: list[set[int]] = []
        for shard in shards[40 * epoch : 40 * epoch + 40].tolist():
            if not windows or (shard not in windows[-1] and len(windows[-1]) == 2):
                windows.append(set())
            windows[-1].add(shard)
        assert len(windows) == 4 and len(set.union(*windows)) == 8, "a shard is read in two windows"
    changes = int((np.diff(shards) != 0).sum())
    assert changes > 20  # samples of a window are mixed, not read shard after shard
    assert not np.array_equal(samples[:40], samples[40:])


def test_a_draw_needs_no_replay() -> None:
    whole, part = (ShardOrder(STARTS, seed=1, window=3, lane=1, lanes=2) for _ in range(2))
    assert np.array_equal(part.samples(np.arange(57, 71)), whole.samples(np.arange(100))[57:71])


def test_a_substitute_is_of_the_same_shard() -> None:
    order = ShardOrder(STARTS, seed=0)
    assert {order.substitute(13, draw) for draw in (0.0, 0.3, 0.6, 0.999)} == {12, 14, 16, 19}


def test_more_processes_than_shards_are_refused() -> None:
    with pytest.raises(UsageError, match="8 remote shards cannot be shared by 9 processes"):
        ShardOrder(STARTS, seed=0, lanes=9)


def test_the_order_of_shards_depends_on_seed_name_epoch_and_lane() -> None:
    """Shards of one sample each, one at a time: nothing but their order can differ."""
    found = []
    for seed, name in ((0, "0"), (0, "1"), (1, "0")):
        for lane in range(2):
            order = ShardOrder(np.arange(41), seed=seed, name=name, window=1, lane=lane, lanes=2)
            own = order.shards.tolist()
            for epoch in range(2):
                samples = order.samples(np.arange(20 * epoch, 20 * epoch + 20))
                found.append(tuple(own.index(sample) for sample in samples.tolist()))
    assert len(set(found)) == 12
    lanes = [ShardOrder(STARTS, seed=s, name=n, lanes=2).shards for s, n in ((0, "0"), (0, "1"), (1, "0"))]
    assert len({frozenset(shards.tolist()) for shards in lanes}) == 3


def test_samples_of_a_window_are_mixed_otherwise_by_seed_name_epoch_lane_and_window() -> None:
    """Windows of one shard of ten samples: nothing but their order in it can differ."""
    found = []
    for seed, name in ((0, "0"), (0, "1"), (1, "0")):
        for lane in range(2):
            order = ShardOrder(np.arange(0, 41, 10), seed=seed, name=name, window=1, lane=lane, lanes=2)
            for first in (0, 10, 20, 30):  # two shards an epoch
                samples = order.samples(np.arange(first, first + 10))
                found.append(tuple((samples % 10).tolist()))
    assert len(set(found)) == 24


def remote_samples(folder: Path, counts: list[int]) -> list[Sample]:
    """Tars of PNG files, named by URLs."""
    samples = []
    for number, count in enumerate(counts):
        path = folder / f"{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (20, 20), colour(len(samples))).save(buffer, "PNG")
                entry = tarfile.TarInfo(f"{len(samples):05d}.png")
                entry.size = len(buffer.getvalue())
                offset = tar.fileobj.tell() + 512  # type: ignore[union-attr]
                tar.addfile(entry, io.BytesIO(buffer.getvalue()))
                ref = ImageRef(path.as_uri(), offset, entry.size)
                samples.append(Sample(entry.name, ref, {"short": (f"caption {len(samples)}",)}))
    return samples


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("remote")
    return write_test_bank(folder / "bank", remote_samples(folder, [6, 5, 7, 6]))


def dataset_of(*banks: Bank, cache: Path, **options: Any) -> BankDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM2CLIP_SHARD_CACHE", str(cache))
        return BankDataset(banks, **{"transform": TRANSFORM, "batch_size": 4, **options})


def test_batches_from_shards_behind_urls(bank: Bank, tmp_path: Path) -> None:
    batches = list(BankLoader(dataset_of(bank, cache=tmp_path)).batches(0, 6))
    assert sorted(sample for batch in batches for sample in batch.samples.tolist()) == list(range(24))
    for batch in batches:
        assert not batch.bad
        for pixels, sample in zip(batch.pixels, batch.samples.tolist(), strict=True):
            assert tuple(pixels[:, 5, 5].tolist()) == colour(sample)
    assert len(list(tmp_path.glob("*.tar"))) == 4


def test_workers_and_a_fresh_start_give_the_same_from_shards(bank: Bank, tmp_path: Path) -> None:
    alone = list(BankLoader(dataset_of(bank, cache=tmp_path / "a")).batches(0, 8))
    later = list(BankLoader(dataset_of(bank, cache=tmp_path / "b"), workers=2).batches(3, 8))
    assert all(equal(one, another) for one, another in zip(alone[3:], later, strict=True))


def test_each_process_fetches_its_own_shards_only(bank: Bank, tmp_path: Path) -> None:
    seen: list[set[int]] = []
    for process in range(2):
        dataset = dataset_of(bank, cache=tmp_path / str(process), num_processes=2)
        batches = list(BankLoader(dataset, process=process).batches(0, 2 * dataset.batches_per_epoch))
        seen.append({sample for batch in batches for sample in batch.samples.tolist()})
        assert len(list((tmp_path / str(process)).glob("*.tar"))) == 2
    assert seen[0].isdisjoint(seen[1])


def test_shards_beside_a_local_bank(bank: Bank, tmp_path: Path) -> None:
    local = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "images", 12))
    dataset = dataset_of(bank, local, cache=tmp_path / "cache", batch_size=6)
    drawn = [sample for batch in BankLoader(dataset).batches(0, 6) for sample in batch.samples.tolist()]
    assert sorted(drawn) == list(range(36))


def test_a_local_bank_beside_shards_is_shared_out_among_processes(tmp_path: Path) -> None:
    """Each process draws its own half of it, in another order each epoch, and both banks at their rates."""
    bank = write_test_bank(tmp_path / "remote", remote_samples(tmp_path, [6, 6, 6, 6]))
    local = write_test_bank(tmp_path / "bank", image_samples(tmp_path / "images", 24))
    drawn = []
    for process in range(2):
        dataset = dataset_of(bank, local, cache=tmp_path / "cache", batch_size=8, num_processes=2)
        batches = list(BankLoader(dataset, process=process).batches(0, 12))  # two epochs of each bank
        samples = torch.cat([batch.samples for batch in batches])
        drawn.append(samples[samples >= 24].tolist())
    first, second = drawn
    assert len(first) == len(second) == 24 and set(first) | set(second) == set(range(24, 48))
    assert sorted(first[:12]) == sorted(first[12:]) and first[:12] != first[12:]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_shard_is_asked_for_batches_before_it_is_read(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Whatever workers share a batch: each asks for what others will read in its places."""
    monkeypatch.setattr(remote_module, "WINDOW", 1)
    asked: set[str] = set()
    monkeypatch.setattr(ShardCache, "fetch_ahead", lambda cache, ref: asked.add(ref.path))
    datasets = [dataset_of(bank, cache=tmp_path, batch_size=3) for _ in range(workers)]
    known: list[set[str]] = []
    for number in range(24):  # three epochs
        for place in range(3):
            batch = datasets[(number + place) % workers][number, place, place + 1]
            assert isinstance(batch, Batch)
            url = bank.image(int(batch.samples)).path
            assert number < 2 or url in known[number - 2]
        known.append(set(asked))
        asked.clear()


def test_local_images_and_single_urls_are_shuffled_freely(bank: Bank, tmp_path: Path) -> None:
    order_of = functools.partial(open_order, weights=None, batch_size=4, seed=0, num_processes=1)
    assert isinstance(order_of([bank])[0], RemoteOrder)
    singles = [Sample(str(i), ImageRef(f"memory://{i}.png"), {"short": (str(i),)}) for i in range(5)]
    single = write_test_bank(tmp_path / "single", singles)
    assert shard_starts(single) is None and isinstance(order_of([single])[0], Mixture)
    ref = single.image(0)
    assert ShardCache(tmp_path).local(ref) is ref


def put(name: str, size: int) -> str:
    with fsspec.open(f"memory://{name}", "wb") as file:
        file.write(bytes(size))
    return f"memory://{name}"


def test_a_shard_is_fetched_once(tmp_path: Path) -> None:
    cache, url = ShardCache(tmp_path / "cache"), put("once.tar", 100)
    path = cache.fetch(url)
    assert path.read_bytes() == bytes(100) and path.suffix == ".tar"
    fsspec.filesystem("memory").rm("once.tar")
    assert cache.fetch(url) == path
    assert ShardCache(tmp_path / "cache").local(ImageRef(url, 5, 10)) == ImageRef(str(path), 5, 10)


def test_two_at_once_fetch_a_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download begins when both have asked for the lock, as two processes that need the shard at once do."""
    url, both, fetched = put("both.tar", 10), threading.Barrier(2), []
    waiting = threading.Event()

    class Asked(FileLock):
        def acquire(self, *arguments: Any, **options: Any) -> Any:
            if both.wait(20) == 0:
                waiting.set()
            return super().acquire(*arguments, **options)

    def get_file(remote: str, path: str) -> None:
        fetched.append(remote)
        assert waiting.wait(20)
        Path(path).write_bytes(bytes(10))

    monkeypatch.setattr(remote_module, "FileLock", Asked)
    monkeypatch.setattr(remote_module, "filesystem_of", lambda name: (SimpleNamespace(get_file=get_file), name))
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(ShardCache(tmp_path).fetch, url) for _ in range(2)]
        assert [future.result(60).read_bytes() for future in futures] == [bytes(10)] * 2
    assert fetched == [url]


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path)

    def get_file(remote: str, path: str) -> None:
        Path(path).write_bytes(bytes(5))
        assert not cache.path("memory://whole.tar").exists()

    monkeypatch.setattr(remote_module, "filesystem_of", lambda name: (SimpleNamespace(get_file=get_file), name))
    assert cache.fetch("memory://whole.tar").read_bytes() == bytes(5)


def test_shards_of_one_name_in_two_places_are_two(tmp_path: Path) -> None:
    with fsspec.open("memory://elsewhere/once.tar", "wb") as file:
        file.write(b"another")
    cache = ShardCache(tmp_path)
    assert cache.fetch(put("once.tar", 3)).read_bytes() == bytes(3)
    assert cache.fetch("memory://elsewhere/once.tar").read_bytes() == b"another"


def test_room_is_made_for_the_new_shard_and_no_more(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=400)
    old = [cache.fetch(put(f"old{i}.tar", 100)) for i in range(4)]
    for age, path in enumerate(old):
        os.utime(path, (time.time() - 1000 - age,) * 2)
    cache.fetch(put("new.tar", 150))  # 550 bytes: the two longest unused go, which are the last
    assert [path.exists() for path in old] == [True, True, False, False]


def test_a_shard_in_use_is_kept_though_there_is_no_room(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=100)
    paths = [cache.fetch(put(f"used{i}.tar", 100)) for i in range(3)]
    assert all(path.exists() for path in paths)


def test_a_shard_that_is_not_there_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    waited: list[float] = []
    monkeypatch.setattr(remote_module.time, "sleep", waited.append)

    def fails(error: Exception) -> None:
        def filesystem(name: str) -> object:
            asked.append(name)
            raise error

        monkeypatch.setattr(remote_module, "filesystem_of", filesystem)
        with pytest.raises(SourceError):
            ShardCache(tmp_path).fetch("memory://x.tar")

    fails(FileNotFoundError("x.tar"))
    assert len(asked) == 1 and waited == []
    fails(OSError("reset"))
    assert len(asked) == 1 + 4 and waited == [1, 4, 16]


def test_the_usual_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LLM2CLIP_SHARD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache().folder == tmp_path / ".cache" / "llm2clip" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert ShardCache().folder == tmp_path / "x" / "llm2clip" / "shards"


def test_the_longest_unused_shards_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, max_bytes=250)
    paths = [cache.fetch(put(f"room{i}.tar", 100)) for i in range(2)]
    for path, age in zip(paths, (1000, 2000), strict=True):
        os.utime(path, (time.time() - age,) * 2)
    cache.fetch(put("room2.tar", 100))
    assert paths[0].exists() and not paths[1].exists()
    cache.fetch(put("room3.tar", 100))  # the two others were used just now, or make room
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 300
    assert cache.fetch(put("room1.tar", 100)) == paths[1] and paths[1].exists()


def test_shards_are_fetched_ahead(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    urls = [put(f"ahead{i}.tar", 10) for i in range(3)]
    for url in ("memory://not-there.tar", *urls):
        cache.fetch_ahead(ImageRef(url, 0, 5))
    deadline = time.monotonic() + 20
    while not all(cache.path(url).exists() for url in urls):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_that_cannot_be_fetched_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"the shard memory://gone\.tar cannot be fetched") as caught:
        ShardCache(tmp_path).fetch("memory://gone.tar")
    assert "\n" not in str(caught.value)


def test_a_flaky_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, failures = put("flaky.tar", 10), [OSError("reset"), OSError("reset")]
    real = remote_module.filesystem_of

    def flaky(name: str) -> object:
        if failures:
            raise failures.pop()
        return real(name)

    monkeypatch.setattr(remote_module, "filesystem_of", flaky)
    monkeypatch.setattr(remote_module.time, "sleep", lambda seconds: None)
    assert ShardCache(tmp_path).fetch(url).read_bytes() == bytes(10)
    failures += [OSError("reset")] * remote_module.TRIES
    with pytest.raises(SourceError, match="reset"):
        ShardCache(tmp_path / "other").fetch(url)


def test_a_shard_that_disappears_stops_the_run_in_one_line(tmp_path: Path) -> None:
    samples = remote_samples(tmp_path, [5, 5])
    bank = write_test_bank(tmp_path / "bank", samples)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(SourceError, match=r"00001\.tar cannot be fetched"):
        list(BankLoader(dataset_of(bank, cache=tmp_path / "cache"), workers=1).batches(0, 2))


def test_a_damaged_image_in_a_shard_is_replaced_from_that_shard(tmp_path: Path) -> None:
    samples = remote_samples(tmp_path, [5, 5])
    with (tmp_path / "00000.tar").open("r+b") as file:
        file.seek(samples[2].image.offset)
        file.write(bytes(samples[2].image.length))
    dataset = dataset_of(write_test_bank(tmp_path / "bank", samples), cache=tmp_path / "cache", batch_size=5)
    batches = [dataset[number, 0, 5] for number in range(2)]
    bad = [problem for batch in batches if isinstance(batch, Batch) for problem in batch.bad]
    assert [sample_id for sample_id, _, _ in bad] == ["00002.png"]
    drawn = torch.cat([batch.samples for batch in batches if isinstance(batch, Batch)]).tolist()
    assert len(drawn) == 10 and 2 not in drawn and sum(sample < 5 for sample in drawn) == 5


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("LLM2CLIP_SHARD_CACHE_GIB", "2", 2 * 2**30), ("LLM2CLIP_SHARD_CACHE_GIB", "", 64 * 2**30)],
)
def test_the_cache_is_set_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, expected: int
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLM2CLIP_SHARD_CACHE", str(tmp_path))
    cache = ShardCache()
    assert cache.max_bytes == expected and cache.folder == tmp_path


def test_a_wrong_environment_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM2CLIP_SHARD_CACHE_GIB", "lots")
    with pytest.raises(UsageError, match="'lots'"):
        ShardCache()
    monkeypatch.delenv("LLM2CLIP_SHARD_CACHE_GIB")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        ShardCache(tmp_path / "file" / "cache").fetch("memory://a.tar")
