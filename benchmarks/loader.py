"""Pictures per second of one core, from JPEGs of 512 x 384 in tars to training batches of 336 px, beside open_clip's.

The pictures are made up, of the size and the detail of photographs: smooth colours at four scales with edges and sensor
noise, JPEG quality 90, about 50 KB each. Both pipelines read the same tars, draw the same random crop (0.9 to 1.0,
bicubic) and yield batches of 64 in one process on one core, in turns; the median of the rounds counts, in seconds of
processor time, which other programs on the machine do not stretch. Ours gives uint8 pixels and the captions' vectors
[64, 4096]; open_clip's gives float32 pixels and token ids. The peer is `get_wds_dataset` of open_clip itself, but for
its own reader of tars, which fails with webdataset 1.0: it has webdataset's in its place.
"""

from __future__ import annotations

import io
import os
import statistics
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

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
NUM_PICTURES, PER_TAR, BATCH, ROUNDS = 1024, 256, 64, 7
TEACHER_DIM = 4096


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


def write_tars(folder: Path) -> list[Path]:
    """Tars as img2dataset writes them: `{key}.jpg` and `{key}.txt`."""
    rng = np.random.default_rng(0)
    paths = []
    for first in range(0, NUM_PICTURES, PER_TAR):
        paths.append(folder / f"{first // PER_TAR:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for key in range(first, first + PER_TAR):
                buffer = io.BytesIO()
                photograph(rng).save(buffer, "JPEG", quality=90)
                for name, data in (
                    (f"{key:09d}.jpg", buffer.getvalue()),
                    (f"{key:09d}.txt", f"picture {key}".encode()),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return paths


class RandomVectors:
    """In the place of a teacher: vectors of its width, of no meaning."""

    def prepare(self, texts: list[str]) -> Prepared:
        """The captions as they are."""
        return Prepared([np.arange(len(texts))], np.ones(len(texts), np.int64), None, texts)

    def run(self, prepared: Prepared, sink: Callable[..., None]) -> np.ndarray:
        """Random vectors."""
        vectors = np.random.default_rng(0).normal(size=(len(prepared.texts), TEACHER_DIM)).astype(np.float16)
        sink(prepared.batches[0], (vectors, None))
        return np.ones(len(prepared.texts), np.int32)


def write_test_bank(folder: Path, tars: list[Path]) -> Bank:
    """A bank of the tars."""
    source = open_source(SourceConfig(data=tuple(map(str, tars))))
    plan = Plan(
        out=folder,
        settings={},
        teacher=TeacherFacts(name="random", fingerprint="0" * 16, prompt="", precision="fp32", dim=TEACHER_DIM),
        encoder=RandomVectors(),
        intake=lambda: Intake(source, source.fingerprint, source.bad),
        dtype="float16",
        shard_rows=NUM_PICTURES,
    )
    return Bank.open(write_bank(plan))


def ours(bank: Bank, workers: int) -> Iterator[int]:
    """Our batches, epoch after epoch: how many pictures each has."""
    transform = ImageTransform(image_size=(SIZE, SIZE), resize=SIZE)
    dataset = BankDataset([bank], transform=transform, batch_size=BATCH)
    for batch in BankLoader(dataset, workers=workers).batches():
        assert batch.pixels.shape == (BATCH, 3, SIZE, SIZE) and not batch.bad
        yield len(batch)


def open_clips(tars: list[Path], workers: int) -> Iterator[int]:
    """The batches of open_clip's webdataset pipeline."""
    import open_clip
    import open_clip_train.data
    import webdataset
    from open_clip.transform import image_transform

    options = Namespace(
        train_data="::".join(map(str, tars)),
        train_num_samples=NUM_PICTURES,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH,
        seed=0,
        workers=workers,
        world_size=1,
    )
    transform, tokenizer = image_transform(SIZE, is_train=True), open_clip.SimpleTokenizer()
    with mock.patch.object(open_clip_train.data, "tarfile_to_samples_nothrow", webdataset.tarfile_to_samples()):
        data = open_clip_train.data.get_wds_dataset(options, transform, True, tokenizer=tokenizer)
    epoch = 0
    while True:
        data.set_epoch(epoch)
        for pixels, tokens in data.dataloader:
            assert pixels.shape == (BATCH, 3, SIZE, SIZE) and len(tokens) == BATCH
            yield len(pixels)
        epoch += 1


def decoding(bank: Bank) -> Iterator[int]:
    """Bare decoding of the same JPEGs by Pillow, from memory."""
    from llm2clip.data.bytes import read_bytes

    data = [read_bytes(bank.picture(sample)) for sample in range(BATCH)]
    while True:
        for jpeg in data:
            Image.open(io.BytesIO(jpeg)).convert("RGB")
        yield len(data)


def rates(pipelines: dict[str, Iterator[int]], *, seconds: float) -> dict[str, float]:
    """Median pictures per second of processor time of each pipeline, in turns of `seconds`."""
    found: dict[str, list[float]] = {name: [] for name in pipelines}
    for batches in pipelines.values():
        for _ in range(NUM_PICTURES // BATCH):  # files in memory, workers started, buffers full
            next(batches)
    for _ in range(ROUNDS):
        for name, batches in pipelines.items():
            start, pictures = time.process_time(), 0
            while time.process_time() - start < seconds:
                pictures += next(batches)
            found[name].append(pictures / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in found.items()}


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


def run(device: str) -> list[dict]:
    """Rows for `python -m benchmarks loader`; `device` plays no part, pictures are decoded on the CPU."""
    del device
    with tempfile.TemporaryDirectory() as folder, one_core():
        tars = write_tars(Path(folder))
        bank = write_test_bank(Path(folder) / "bank", tars)
        size = sum(tar.stat().st_size for tar in tars) / NUM_PICTURES / 1024
        found = rates({"ours": ours(bank, 0), "peer": open_clips(tars, 0), "decoding": decoding(bank)}, seconds=1.0)
    peer, unit = "open_clip's webdataset pipeline", "pictures/s a core"
    return [
        {"name": "JPEG of 512 x 384", "value": size, "unit": "KiB", "ratio": None, "against": ""},
        {"name": peer, "value": found["peer"], "unit": unit, "ratio": 1.0, "against": peer},
        {"name": "ours", "value": found["ours"], "unit": unit, "ratio": found["ours"] / found["peer"], "against": peer},
        {
            "name": "bare decoding (Pillow)",
            "value": found["decoding"],
            "unit": unit,
            "ratio": found["decoding"] / found["peer"],
            "against": peer,
        },
    ]
