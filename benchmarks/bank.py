"""The bank as a store: random gathers against one numpy memory map, peak memory against size, what int8 costs.

The gathers read 4,096 rows of 4,096 float16 dimensions out of 65,536 (512 MiB, in the page cache), from 1 and from 4
processes. Peak memory is that of whole processes that build a bank with a mini LLM, its captions from a file.
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROWS, DIM, GATHER = 65536, 4096, 4096
REPEATS = 15
FEW, MANY = 10_000, 200_000
BUILD = """
import json, resource, sys
from pathlib import Path
from benchmarks.bank import build_from_lines
num_rows = build_from_lines(*map(Path, sys.argv[1:]))
print(json.dumps({"rows": num_rows, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def run(device: str, until: float | None = None) -> Iterator[dict]:
    """Rows for the table of `python -m benchmarks bank`."""
    with tempfile.TemporaryDirectory() as scratch:
        yield from gather_rows(Path(scratch))
        yield from int8_rows()
        yield from memory_rows(Path(scratch))


def gather_rows(scratch: Path) -> list[dict]:
    """Vectors a second, from a bank of two shards and from one plain memory map, in turns."""
    bank, plain = make_bank(scratch / "bank"), scratch / "plain.npy"
    shutil.copyfile(bank / "vectors" / "vectors.npy", plain)
    rows = []
    for processes in (1, 4):
        with get_context("spawn").Pool(processes) as pool:
            rates: dict[str, list[float]] = {"bank": [], "plain": []}
            for repeat in range(REPEATS + 2):
                for name, path in (("bank", bank), ("plain", plain)):
                    seeds = [(name, str(path), repeat * processes + i) for i in range(processes)]
                    seconds = pool.map(gather_seconds, seeds, chunksize=1)
                    if repeat >= 2:
                        rates[name].append(processes * GATHER / max(seconds))
        ratio = statistics.median(a / b for a, b in zip(rates["bank"], rates["plain"], strict=True))
        rows.append(
            {
                "name": f"gather of {GATHER:,} x {DIM:,} float16, {processes} process{'es' * (processes > 1)}",
                "value": statistics.median(rates["bank"]),
                "unit": "rows/s",
                "ratio": ratio,
                "against": "one numpy memory map",
            }
        )
    return rows


def make_bank(folder: Path) -> Path:
    """A bank of random vectors, written with the library's own parts."""
    from llm2clip.bank.build import Plan, write_bank_manifest
    from llm2clip.bank.collect import Intake, collect
    from llm2clip.bank.load import TeacherFacts
    from llm2clip.bank.reader import Table
    from llm2clip.bank.vectors import Layout, ShardBuffer
    from llm2clip.data.bad import BadSamples
    from llm2clip.data.sample import ImageRef, Sample

    folder.mkdir(parents=True)
    samples = (Sample(str(i), ImageRef("a.tar", i), {"raw": (str(i),)}) for i in range(ROWS))
    intake = Intake(samples, "benchmark", BadSamples(0))
    collect(intake, folder)
    layout = Layout(folder, ROWS, ROWS // 2, "float16", DIM)
    layout.prepare()
    draw = np.random.default_rng(0)
    shards = []
    for shard in range(layout.num_shards):
        buffer = ShardBuffer(layout, shard)
        buffer.vectors.view(np.uint16)[:] = draw.integers(0, 0x3C00, buffer.vectors.shape, np.uint16)
        shards.append(buffer.write())
    facts = TeacherFacts("benchmark", "0", "", "fp32", DIM)
    plan = Plan(
        out=folder,
        settings={},
        teacher=facts,
        encoder=None,
        intake=lambda: intake,
        dtype="float16",
        shard_rows=ROWS // 2,
    )
    write_bank_manifest(plan, Table(folder), shards)
    return folder


_readers: dict[str, Callable[[np.ndarray], np.ndarray]] = {}


def gather_seconds(job: tuple[str, str, int]) -> float:
    """Seconds that one gather of random rows takes, in this process."""
    name, path, seed = job
    if path not in _readers:
        from llm2clip.bank.reader import Bank

        _readers[path] = Bank.open(path).vectors if name == "bank" else np.load(path, mmap_mode="r").__getitem__
    rows = np.random.default_rng(seed).integers(0, ROWS, GATHER)
    start = time.perf_counter()
    vectors = np.asarray(_readers[path](rows))
    seconds = time.perf_counter() - start
    assert vectors.shape == (GATHER, DIM)
    return seconds


def int8_rows() -> list[dict]:
    """How far int8 vectors point from float ones, and what it does to finding a caption's twin.

    The vectors imitate an LLM's: most dimensions alike, a few tens of times larger, and a common direction.
    """
    import torch

    from llm2clip.bank.dtypes import pack, unpack
    from llm2clip.bank.verify import cosines

    draw = np.random.default_rng(0)
    scale = np.where(draw.random(DIM) < 0.002, draw.uniform(10, 40, DIM), draw.lognormal(0, 0.4, DIM))
    base = draw.normal(0.5, 1, DIM)
    images = draw.normal(0, 1, (2000, DIM))
    first, second = ((base + images + draw.normal(0, 1.0, images.shape)) * scale for _ in range(2))

    def through_int8(vectors: np.ndarray) -> np.ndarray:
        stored, scales = pack(torch.from_numpy(vectors), "int8")
        assert scales is not None
        return unpack(stored.numpy(), scales.numpy(), "int8")

    packed = through_int8(first), through_int8(second)
    cosine = np.concatenate([cosines(a, b) for a, b in zip((first, second), packed, strict=True)])
    before, after = recall_at_1(first, second), recall_at_1(*packed)
    return [
        {
            "name": "int8, least cosine to float",
            "value": float(cosine.min()),
            "unit": "",
            "ratio": None,
            "against": None,
        },
        {
            "name": "int8, R@1 of a caption's twin",
            "value": 100 * after,
            "unit": "points",
            "ratio": after / before,
            "against": f"float ({100 * before:.2f})",
        },
    ]


def recall_at_1(queries: np.ndarray, targets: np.ndarray) -> float:
    """Share of queries whose nearest target (cosine) is the one of their own number."""
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    targets = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    return float(((queries @ targets.T).argmax(1) == np.arange(len(queries))).mean())


def memory_rows(scratch: Path) -> list[dict]:
    """Peak memory of building a bank of few and of many captions, each in a process of its own."""
    from benchmarks.encode import captions, make_llm

    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    make_llm(scratch / "llm", captions(500), sizes=tiny)
    peaks = {}
    for count in (FEW, MANY):
        write_lines(scratch / f"{count}.csv", count)
        arguments = [str(scratch / name) for name in (f"{count}.csv", "llm", f"bank{count}")]
        printed = subprocess.run([sys.executable, "-c", BUILD, *arguments], capture_output=True, text=True, check=True)
        report = json.loads(printed.stdout.splitlines()[-1])
        assert report["rows"] == count
        peaks[count] = report["peak"]
    return [
        {
            "name": f"peak memory, {MANY:,} captions",
            "value": peaks[MANY],
            "unit": "MiB",
            "ratio": peaks[MANY] / peaks[FEW],
            "against": f"{FEW:,} captions",
        }
    ]


def write_lines(path: Path, count: int) -> None:
    """`count` distinct captions of 4 to 40 words, a line each."""
    draw = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for i in range(count):
            writer.writerow([f"{i} " + " ".join(words[j] for j in draw.integers(0, 200, int(draw.integers(2, 21))))])


def build_from_lines(lines: Path, llm: Path, out: Path) -> int:
    """Build a bank whose samples are the lines of a file; returns the rows."""
    import torch

    from llm2clip.bank.build import Plan, write_bank
    from llm2clip.bank.collect import Intake
    from llm2clip.bank.encoder import CaptionEncoder
    from llm2clip.bank.load import facts_of, load_for_encoding
    from llm2clip.bank.reader import Bank
    from llm2clip.data.bad import BadSamples
    from llm2clip.data.sample import ImageRef, Sample

    teacher = load_for_encoding(str(llm), device=torch.device("cpu"), precision="bf16")
    encoder = CaptionEncoder(teacher, batch_tokens=4096)
    facts = facts_of(teacher, str(llm), prompt="", precision="bf16", dim=encoder.dim)
    with lines.open(encoding="utf-8") as file:
        samples = (Sample(str(i), ImageRef("a.tar", i), {"raw": (line.strip(),)}) for i, line in enumerate(file))
        intake = Intake(samples, "benchmark", BadSamples(0))
        plan = Plan(
            out=out,
            settings={},
            teacher=facts,
            encoder=encoder,
            intake=lambda: intake,
            dtype="float16",
            shard_rows=32768,
        )
        write_bank(plan)
    return Bank.open(out).num_rows
