"""Images per second of one core, from JPEGs of 512 x 384 in tars to training batches of 336 px, beside open_clip's.

The images are made up, of the size and the detail of photographs: smooth colours at four scales with edges and sensor
noise, JPEG quality 90, about 50 KB each. Both pipelines read the same tars, draw the same random crop (0.9 to 1.0,
bicubic) and yield batches of 64 in one process on one core, in turns; the median of the rounds counts, in seconds of
processor time, which other programs on the machine do not stretch. Ours gives uint8 pixels and the captions' vectors
[64, 4096]; open_clip's gives float32 pixels and token ids. The peer is `get_wds_dataset` of open_clip itself, but for
its own reader of tars, which fails with webdataset 1.0: it has webdataset's in its place. For a GPU also the rate of a
worker on every core, by the clock, which is what a training step can have at most.
"""

from __future__ import annotations

import importlib.util
import io
import os
import statistics
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.device import rounds, share_of
from benchmarks.rows import not_measured, spread
from llm2clip.bank.build import Plan, write_bank
from llm2clip.bank.collect import Intake
from llm2clip.bank.encoder import Prepared
from llm2clip.bank.load import TeacherFacts
from llm2clip.bank.reader import Bank
from llm2clip.data.config import SourceConfig
from llm2clip.data.source import open_source
from llm2clip.student.data import BankDataset
from llm2clip.student.loader import BankLoader
from llm2clip.student.transform import ImageTransform

WIDTH, HEIGHT, SIZE = 512, 384, 336
TEACHER_DIM = 4096


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is read."""

    images: int
    distinct: int
    """JPEGs that are made; the others are the same again."""
    per_tar: int
    batch: int
    rounds: int
    seconds: float
    """Of one pipeline in one round."""
    all_cores: bool = True


SETTINGS = {
    "tiny": Setting(images=64, distinct=4, per_tar=32, batch=16, rounds=1, seconds=0.1),
    "cpu": Setting(images=1024, distinct=1024, per_tar=256, batch=64, rounds=7, seconds=1.0, all_cores=False),
    "gpu": Setting(images=512, distinct=32, per_tar=64, batch=64, rounds=5, seconds=0.5),
}
GPU_SIZES = ("gpu",)


def photograph(rng: np.random.Generator) -> Image.Image:
    """Smooth colours at four scales, edges, and noise."""
    pixels = np.full((HEIGHT, WIDTH, 3), 120, np.float32)
    for cells, strength in ((4, 60), (16, 35), (64, 14), (160, 8)):
        coarse = rng.normal(size=(cells * HEIGHT // WIDTH + 1, cells, 3)).astype(np.float32) * strength
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer)
    for _ in range(6):
        left, top = rng.integers(0, WIDTH - 60), rng.integers(0, HEIGHT - 60)
        width, height = rng.integers(20, 200, 2)
        pixels[top : top + height, left : left + width] += rng.normal(size=3) * 40
    pixels += rng.normal(size=(HEIGHT, WIDTH, 1)) * 3
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_tars(folder: Path, *, images: int, distinct: int, per_tar: int) -> list[Path]:
    """Tars as img2dataset writes them: `{key}.jpg` and `{key}.txt`; `distinct` JPEGs again and again."""
    rng = np.random.default_rng(0)
    paths, jpegs = [], []
    for first in range(0, images, per_tar):
        paths.append(folder / f"{first // per_tar:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for key in range(first, min(first + per_tar, images)):
                if key < distinct:
                    buffer = io.BytesIO()
                    photograph(rng).save(buffer, "JPEG", quality=90)
                    jpegs.append(buffer.getvalue())
                for name, data in (
                    (f"{key:09d}.jpg", jpegs[key % distinct]),
                    (f"{key:09d}.txt", f"image {key}".encode()),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return paths


class RandomVectors:
    """In the place of a teacher: vectors of its width, of no meaning."""

    cuts = SimpleNamespace(limit=None)

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def prepare(self, texts: list[str]) -> Prepared:
        """The captions as they are."""
        return Prepared([np.arange(len(texts))], np.ones(len(texts), np.int64), None, texts)

    def run(self, prepared: Prepared, sink: Callable[..., None]) -> np.ndarray:
        """Random vectors."""
        vectors = np.random.default_rng(0).normal(size=(len(prepared.texts), self.dim)).astype(np.float16)
        sink(prepared.batches[0], (vectors, None))
        return np.ones(len(prepared.texts), np.int32)


def write_test_bank(folder: Path, tars: list[Path], *, dim: int = TEACHER_DIM) -> Bank:
    """A bank of the tars, of vectors of `dim` numbers."""
    source = open_source(SourceConfig(data=tuple(map(str, tars))))
    plan = Plan(
        out=folder,
        settings={},
        teacher=TeacherFacts(name="random", fingerprint="0" * 16, prompt="", precision="fp32", dim=dim),
        encoder=RandomVectors(dim),
        intake=lambda: Intake(source, source.fingerprint, source.bad),
        dtype="float16",
        shard_rows=1024,
    )
    return Bank.open(write_bank(plan))


def ours(bank: Bank, batch_size: int, workers: int) -> Iterator[int]:
    """Our batches, epoch after epoch: how many images each has."""
    transform = ImageTransform(image_size=(SIZE, SIZE), resize=SIZE)
    dataset = BankDataset([bank], transform=transform, batch_size=batch_size)
    for batch in BankLoader(dataset, workers=workers).batches():
        assert batch.pixels.shape == (batch_size, 3, SIZE, SIZE) and not batch.bad
        yield len(batch)


def open_clips(tars: list[Path], setting: Setting) -> Iterator[int]:
    """The batches of open_clip's webdataset pipeline."""
    import open_clip
    import open_clip_train.data
    import webdataset
    from open_clip.transform import image_transform

    options = Namespace(
        train_data="::".join(map(str, tars)),
        train_num_samples=setting.images,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=setting.batch,
        seed=0,
        workers=0,
        world_size=1,
    )
    transform, tokenizer = image_transform(SIZE, is_train=True), open_clip.SimpleTokenizer()
    with mock.patch.object(open_clip_train.data, "tarfile_to_samples_nothrow", webdataset.tarfile_to_samples()):
        data = open_clip_train.data.get_wds_dataset(options, transform, True, tokenizer=tokenizer)
    epoch = 0
    while True:
        data.set_epoch(epoch)
        for pixels, tokens in data.dataloader:
            assert pixels.shape == (setting.batch, 3, SIZE, SIZE) and len(tokens) == setting.batch
            yield len(pixels)
        epoch += 1


def decoding(bank: Bank, batch_size: int) -> Iterator[int]:
    """Bare decoding of the same JPEGs by Pillow, from memory."""
    from llm2clip.data.bytes import read_bytes

    data = [read_bytes(bank.image(sample)) for sample in range(batch_size)]
    while True:
        for jpeg in data:
            Image.open(io.BytesIO(jpeg)).convert("RGB")
        yield len(data)


def rates(
    pipelines: dict[str, Iterator[int]], setting: Setting, *, until: float | None, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Images per second of each pipeline in each round, which take turns."""
    found: dict[str, list[float]] = {name: [] for name in pipelines}
    for batches in pipelines.values():
        for _ in range(setting.images // setting.batch):  # files in memory, workers started, buffers full
            next(batches)
    for _ in rounds(setting.rounds, until):
        for name, batches in pipelines.items():
            start, images = clock(), 0
            while clock() - start < setting.seconds:
                images += next(batches)
            found[name].append(images / (clock() - start))
    return found


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and those it starts, on one core and torch on one thread."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def run(settings: list[Setting], device: str, until: float | None = None) -> Iterator[dict]:
    """Rows for `python -m benchmarks loader`; `device` plays no part, images are decoded on the CPU."""
    del device
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            tars = write_tars(Path(folder), images=setting.images, distinct=setting.distinct, per_tar=setting.per_tar)
            size = sum(tar.stat().st_size for tar in tars) / setting.images / 1024
            yield {"name": "JPEG of 512 x 384", "value": size, "unit": "KiB", "ratio": None, "against": ""}
            bank = write_test_bank(Path(folder) / "bank", tars)
            with one_core():
                per_core = yield from rows_of_a_core(setting, bank, tars, share_of(until, 2))
            if setting.all_cores:
                yield all_cores(setting, bank, per_core, until)


def rows_of_a_core(setting: Setting, bank: Bank, tars: list[Path], until: float | None) -> Generator[dict, None, float]:
    """Rows of the pipelines on one core; returns the rate of ours."""
    peer, unit = "open_clip's webdataset pipeline", "images/s a core"
    bare = "bare decoding (Pillow)"
    pipelines = {"ours": ours(bank, setting.batch, 0), bare: decoding(bank, setting.batch)}
    missing = [name for name in ("open_clip", "open_clip_train", "webdataset") if not importlib.util.find_spec(name)]
    if missing:
        yield not_measured(peer, f"{missing[0]} is not installed")
    else:
        pipelines = {peer: open_clips(tars, setting), **pipelines}
    found = rates(pipelines, setting, until=until, clock=time.process_time)
    against = bare if missing else peer
    for name, values in found.items():
        ratios = [value / limit for value, limit in zip(values, found[against], strict=True)]
        yield {
            "name": name,
            "value": statistics.median(values),
            "unit": unit,
            "ratio": statistics.median(values) / statistics.median(found[against]),
            "against": against,
            "spread": None if name == against else spread(ratios),
        }
    return statistics.median(found["ours"])


def all_cores(setting: Setting, bank: Bank, per_core: float, until: float | None) -> dict:
    """The rate of ours with a worker on every core."""
    cores = len(os.sched_getaffinity(0))
    batches = ours(bank, setting.batch, cores)
    values = rates({"ours": batches}, setting, until=until, clock=time.perf_counter)["ours"]
    batches.close()
    return {
        "name": f"ours, {cores} workers",
        "value": statistics.median(values),
        "unit": "images/s",
        "ratio": statistics.median(values) / (cores * per_core),
        "against": f"{cores} times that of one core",
        "spread": spread(values),
    }
