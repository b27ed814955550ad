"""`bank info`: what a bank holds, as a page of text or as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2clip.bank.config import BankInfoConfig
from llm2clip.bank.reader import Bank
from llm2clip.progress import human_bytes

BLOCK_CAPTIONS = 1 << 20
EDGES = (0, 1, 9, 17, 33, 65, 129, 257, 513, 1025)
"""First token count of each bar of the histogram; 0: the teacher did not tell."""
BAR_WIDTH = 40


def bank_info(config: BankInfoConfig) -> dict[str, Any]:
    """Print what a bank holds, and return it (see `bank_facts`)."""
    facts = bank_facts(config.bank)
    text = json.dumps(facts, indent=2, ensure_ascii=False) if config.json else as_text(facts)
    sys.stdout.write(text + "\n")
    return facts


def bank_facts(folder: str | Path) -> dict[str, Any]:
    """Counts by kind, lengths in tokens, sources, sizes and fingerprints of the bank in `folder`.

    Raises:
        UsageError: if there is no bank.
        ArtifactError: if it is unfinished or lacks a file.
    """
    bank = Bank.open(folder)
    manifest = bank.manifest
    counts = token_counts_by_kind(bank)
    kinds = {
        kind: {**manifest["kinds"][kind], "tokens": summary(counts[code]), "histogram": histogram(counts[code])}
        for code, kind in enumerate(bank.kinds)
    }
    config = manifest["config"]
    return {
        "folder": str(folder),
        "fingerprint": bank.fingerprint,
        "teacher": manifest["teacher"],
        "sources": [
            *([config["bank"]] if "bank" in config else []),
            *(config.get("data") or config.get("benchmark") or config["banks"]),
        ],
        "source_fingerprint": manifest["source_fingerprint"],
        "num_samples": bank.num_samples,
        "num_captions": manifest["num_captions"],
        "num_rows": bank.num_rows,
        "num_tokens": manifest["num_tokens"],
        "cut": manifest.get("cut"),
        "dim": bank.dim,
        "dtype": bank.dtype,
        "shards": bank.layout.num_shards,
        "bytes": {"vectors": _size(bank.folder / "vectors"), "table": _size(bank.folder / "table")},
        "bad_samples": manifest["bad_samples"],
        "kinds": kinds,
        "histogram": histogram(counts.sum(0)),
    }


def token_counts_by_kind(bank: Bank) -> NDArray[np.int64]:
    """How many captions of each kind have how many tokens `[kinds, longest + 1]`."""
    counts = np.zeros((len(bank.kinds), 1), np.int64)
    for first in range(0, len(bank.caption_row), BLOCK_CAPTIONS):
        block = slice(first, first + BLOCK_CAPTIONS)
        tokens, kinds = bank.tokens(bank.caption_row[block]), bank.caption_kind[block]
        width = max(counts.shape[1], int(tokens.max()) + 1)
        counts = np.pad(counts, ((0, 0), (0, width - counts.shape[1])))
        flat = np.bincount(kinds.astype(np.int64) * width + tokens, minlength=counts.size)
        counts += flat.reshape(counts.shape)
    return counts


def summary(counts: NDArray[np.int64]) -> dict[str, float]:
    """Mean, median, 95th percentile and longest length, of captions counted by length `[longest + 1]`.

    >>> summary(np.array([0, 0, 3, 0, 1]))
    {'mean': 2.5, 'median': 2, 'p95': 4, 'longest': 4}
    """
    total = counts.sum()
    if not total:
        return {"mean": 0.0, "median": 0, "p95": 0, "longest": 0}
    below = np.cumsum(counts)
    mean = float(counts @ np.arange(len(counts)) / total)
    median, p95 = (int(np.searchsorted(below, share * total)) for share in (0.5, 0.95))
    return {"mean": round(mean, 2), "median": median, "p95": p95, "longest": int(np.flatnonzero(counts)[-1])}


def histogram(counts: NDArray[np.int64]) -> dict[str, int]:
    """Captions in each range of lengths that has any.

    >>> histogram(np.array([0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 5]))
    {'1-8': 4, '9-16': 5}
    """
    bars = {}
    for first, end in zip(EDGES, (*EDGES[1:], None), strict=True):
        number = int(counts[first:end].sum())
        if number:
            bars[f"{first}+" if end is None else f"{first}-{end - 1}" if first else "unknown"] = number
    return bars


def as_text(facts: dict[str, Any]) -> str:
    """The facts for a person."""
    teacher = facts["teacher"]
    at = f" at {teacher['revision']}" if teacher.get("revision") else ""
    repeated = 1 - facts["num_rows"] / facts["num_captions"]
    lines = [
        f"bank      {facts['folder']}  (fingerprint {facts['fingerprint']})",
        f"teacher   {teacher['name']}{at}  (fingerprint {teacher['fingerprint']}, {teacher['precision']})",
        f"prompt    {teacher['prompt']!r}" if teacher["prompt"] else "prompt    none",
        f"sources   {', '.join(facts['sources'])}",
        f"samples   {facts['num_samples']:,}; bad and left out: {facts['bad_samples']['num_bad']:,}",
        f"captions  {facts['num_captions']:,}, distinct {facts['num_rows']:,} ({repeated:.1%} repeated), "
        f"{facts['num_tokens']:,} tokens",
        f"vectors   {facts['dim']} x {facts['dtype']} in {facts['shards']} shards, "
        f"{human_bytes(facts['bytes']['vectors'])}; table {human_bytes(facts['bytes']['table'])}",
        *cut_lines(facts),
        "",
        f"{'kind':<12}{'samples':>12}{'captions':>12}{'tokens: mean':>14}{'median':>8}{'95 %':>8}{'longest':>9}",
    ]
    for kind, counts in facts["kinds"].items():
        tokens = counts["tokens"]
        lines.append(
            f"{kind:<12}{counts['samples']:>12,}{counts['captions']:>12,}{tokens['mean']:>14.1f}"
            f"{tokens['median']:>8}{tokens['p95']:>8}{tokens['longest']:>9}"
        )
    lines += ["", f"{'tokens':<12}{'captions':>12}"]
    most = max(facts["histogram"].values(), default=1)
    lines += [
        f"{bar:<12}{count:>12,} {'█' * round(BAR_WIDTH * count / most)}" for bar, count in facts["histogram"].items()
    ]
    return "\n".join(lines)


def cut_lines(facts: dict[str, Any]) -> list[str]:
    """A line on captions that were cut; none for a bank that did not count them."""
    cut = facts["cut"]
    if cut is None or cut["limit"] is None:
        return []
    share = f"{cut['rows'] / facts['num_rows']:.1%}"
    return [f"cut       {cut['rows']:,} distinct captions ({share}) are longer than the {cut['limit']:,} tokens read"]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
