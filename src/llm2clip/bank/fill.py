"""The second pass of a bank: shard by shard, captions to vectors, by one process or many at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm2clip.bank.claims import Claims
from llm2clip.bank.dtypes import Stored, row_bytes
from llm2clip.bank.encoder import CaptionEncoder, Prepared
from llm2clip.bank.reader import Table
from llm2clip.bank.reuse import Reuse
from llm2clip.bank.vectors import Layout, ShardBuffer
from llm2clip.outlook import needs
from llm2clip.progress import Progress

WAIT_SECONDS = 2.0
"""Between two looks at shards that other processes are working on."""


@dataclass
class Job:
    """A shard this process has claimed: what to copy is in the buffer already, what to encode is prepared."""

    shard: int
    buffer: ShardBuffer
    places: NDArray[np.int64]
    prepared: Prepared | None


def fill(
    layout: Layout,
    table: Table,
    encoder: CaptionEncoder | None,
    reuse: Reuse,
    *,
    claims: Claims,
    part: tuple[int, int] = (0, 1),
    offset: float = 0.0,
) -> None:
    """Make every shard that is not whole, together with whoever else works on this folder; returns when all are.

    The next shard is tokenised in the background while one is encoded.

    Args:
        part: (i, n) to see to shards i, i + n, i + 2n, ... only.
        offset: where in the list of shards to begin, 0..1: processes that begin elsewhere rarely meet.
    """
    mine = list(range(part[0], layout.num_shards, part[1]))
    first = int(offset * len(mine))
    mine = mine[first:] + mine[:first]
    missing = [shard for shard in mine if not layout.is_whole(shard)]
    total = sum(len(layout.rows(shard)) for shard in mine)
    done = total - sum(len(layout.rows(shard)) for shard in missing)
    ended = threading.Event()
    jobs = _jobs(layout, table, encoder, reuse, claims, missing, ended)
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as background, contextlib.ExitStack() as stack:
        stack.callback(ended.set)  # a run that fails does not wait for others' shards, nor they for its own
        upcoming = background.submit(next, jobs, None)
        wait([upcoming])  # before the clock starts: later shards are tokenised while one is encoded
        size = row_bytes(layout.dtype, layout.dim)
        progress = stack.enter_context(
            Progress(
                total,
                description="encode",
                unit="captions",
                initial=done,
                unit_bytes=size,
                estimate=lambda: needs(encoder and encoder.device, layout.num_bytes()),
            )
        )
        while (job := upcoming.result()) is not None:
            upcoming = background.submit(next, jobs, None)
            if isinstance(job, Job):
                _encode(job, encoder, table, progress)
                claims.release(_task(job.shard))
            else:
                progress.advance(len(layout.rows(job)))


def _task(shard: int) -> str:
    return f"shard-{shard:05d}"


def _jobs(
    layout: Layout,
    table: Table,
    encoder: CaptionEncoder | None,
    reuse: Reuse,
    claims: Claims,
    missing: list[int],
    ended: threading.Event,
) -> Iterator[Job | int]:
    """Claimed and prepared shards; the bare number of those that another process made in the meantime."""
    while missing:
        left = []
        for shard in missing:
            if not claims.take(_task(shard)):
                left.append(shard)
            elif layout.is_whole(shard):
                claims.release(_task(shard))
                yield shard
            else:
                yield _prepare(layout, table, encoder, reuse, shard)
        missing = left
        if missing and ended.wait(WAIT_SECONDS):  # others hold them: until they are made, or free as a process died
            return


def _prepare(layout: Layout, table: Table, encoder: CaptionEncoder | None, reuse: Reuse, shard: int) -> Job:
    buffer = ShardBuffer(layout, shard)
    rows = layout.rows(shard)
    places = reuse.copy(table.hashes[rows.start : rows.stop], buffer)
    buffer.num_cut = _copied_cut(buffer, table, encoder, reuse.limit)
    if not len(places):
        return Job(shard, buffer, places, None)
    assert encoder is not None, "without a teacher every caption comes from another bank"
    texts = table.texts([rows.start + int(place) for place in places])
    return Job(shard, buffer, places, encoder.prepare(texts))


def _copied_cut(buffer: ShardBuffer, table: Table, encoder: CaptionEncoder | None, limit: int | None) -> int:
    """How many copied captions are longer than the teacher reads; without it, how many fill what it reads."""
    limit = limit if encoder is None else encoder.cuts.limit
    if limit is None:
        return 0
    full = np.flatnonzero(buffer.tokens >= limit)
    if encoder is None or not len(full):
        return len(full)
    return int(encoder.cuts.cut(table.texts([buffer.rows.start + int(place) for place in full])).sum())


def _encode(job: Job, encoder: CaptionEncoder | None, table: Table, progress: Progress) -> None:
    progress.advance(len(job.buffer.vectors) - len(job.places))
    if job.prepared is not None:
        assert encoder is not None
        lengths = job.prepared.lengths

        def sink(places: NDArray[np.int64], stored: Stored) -> None:
            job.buffer.put(job.places[places], stored)
            progress.advance(len(places), work=float(lengths[places].sum() / max(lengths.mean(), 1)))  # longest first

        job.buffer.tokens[job.places] = encoder.run(job.prepared, sink)
        job.buffer.num_cut += job.prepared.num_cut
    job.buffer.check(table.text)
    job.buffer.write()
