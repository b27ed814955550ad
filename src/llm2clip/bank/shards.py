"""The files of vectors: which rows lie in which, whether one is whole, and writing one.

Shard number `n` is `vectors/N.npy` (N in five digits) with `N.tokens.npy`, for int8 `N.scale.npy`, and `N.json`, which
is written last and states size and SHA-256 of the others.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2clip.artifacts import read_json, to_disk
from llm2clip.bank.dtypes import STORED, Stored, num_blocks, row_bytes
from llm2clip.bank.files import temporary_name, write_array, write_facts
from llm2clip.bank.reader import VECTORS, Bank
from llm2clip.errors import LLM2CLIPError, setting

PARTS = {"vectors": ".npy", "scale": ".scale.npy", "tokens": ".tokens.npy"}


@dataclass(frozen=True)
class Layout:
    """How the rows of a bank are cut into shards.

    Attributes:
        folder: the bank's.
        starts: first row of each shard, then the number of rows `[num_shards + 1]`.
        dtype: how vectors are stored.
        dim: length of a vector.
    """

    folder: Path
    starts: tuple[int, ...]
    dtype: str
    dim: int

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return len(self.starts) - 1

    def rows(self, shard: int) -> range:
        """The rows in a shard."""
        return range(self.starts[shard], self.starts[shard + 1])

    def num_bytes(self) -> int:
        """Bytes of all vectors."""
        return self.starts[-1] * row_bytes(self.dtype, self.dim)

    def path(self, shard: int, part: str) -> Path:
        """The file of one part of a shard: "vectors", "scale", "tokens"."""
        return self.folder / VECTORS / f"{shard:05d}{PARTS[part]}"

    def facts_path(self, shard: int) -> Path:
        """The file that says that a shard is whole."""
        return self.folder / VECTORS / f"{shard:05d}.json"


def plan_layout(folder: Path, num_rows: int, shard_rows: int, dtype: str, dim: int, *, base: Bank | None) -> Layout:
    """Shards of `shard_rows` rows, after those of `base`, whose rows come first.

    Example: 10 rows, 4 a shard: starts 0, 4, 8, 10.
    """
    starts = [] if base is None else [base.shard_rows(shard).start for shard in range(base.num_shards)]
    first = 0 if base is None else base.num_rows
    return Layout(folder, (*starts, *range(first, num_rows, shard_rows), num_rows), dtype, dim)


def shard_facts(layout: Layout, shard: int) -> dict[str, Any] | None:
    """The facts of a shard, if it is whole: every file there, with its size."""
    path = layout.facts_path(shard)
    if not path.exists():
        return None
    facts: dict[str, Any] = read_json(path)
    for entry in facts["files"].values():
        file = layout.folder / entry["file"]
        if not file.exists() or file.stat().st_size != entry["bytes"]:
            return None
    return facts


class ShardBuffer:
    """The vectors of one shard in memory, filled in any order, then written at once."""

    def __init__(self, layout: Layout, shard: int) -> None:
        self.layout, self.shard = layout, shard
        num_rows = len(layout.rows(shard))
        self.vectors = np.empty((num_rows, layout.dim), STORED[layout.dtype])
        self.scale = np.empty((num_rows, num_blocks(layout.dim)), np.float32) if layout.dtype == "int8" else None
        self.tokens = np.zeros(num_rows, np.int32)

    def put(self, places: NDArray[np.int64], stored: Stored) -> None:
        """Set the vectors (and scales) of some rows, counted from the shard's first."""
        self.vectors[places] = stored[0]
        if self.scale is not None and stored[1] is not None:
            self.scale[places] = stored[1]

    def check(self, text_of: Any) -> None:
        """Check that every vector is a number.

        Raises:
            LLM2CLIPError: naming the first caption whose vector is not, and the flags that help.
        """
        values: NDArray[Any] = self.vectors if self.scale is None else self.scale
        if self.layout.dtype == "bfloat16":
            bad = ((values & 0x7F80) == 0x7F80).any(axis=1)  # all bits of the exponent set: infinite or no number
        else:
            bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            text = text_of(self.layout.rows(self.shard)[int(bad.argmax())])
            raise LLM2CLIPError(
                f"the vector of caption {text[:60]!r} overflows {self.layout.dtype}; "
                f"use {setting('precision', 'fp32')} and {setting('dtype', 'float32')} in a new folder"
            )

    def write(self) -> dict[str, Any]:
        """Write the shard's files, the facts last, and return the facts."""
        arrays = {"vectors": self.vectors, "tokens": self.tokens}
        if self.scale is not None:
            arrays["scale"] = self.scale
        files = {}
        for part, array in sorted(arrays.items()):
            path = self.layout.path(self.shard, part)
            digest = write_array(path, array)
            files[part] = {"file": f"{VECTORS}/{path.name}", "bytes": path.stat().st_size, "sha256": digest}
        facts = {"rows": len(self.vectors), "tokens": int(self.tokens.sum()), "files": files}
        write_facts(self.layout.facts_path(self.shard), facts)
        return facts


def link_shards(layout: Layout, base: Bank) -> None:
    """Give the shards of `base` to a bank whose first rows are the same: by hard links, else by copies."""
    for shard in range(base.num_shards):
        if shard_facts(layout, shard) is not None:
            continue
        facts = base.manifest["shards"][shard]
        files = {}
        for part, entry in facts["files"].items():
            target = layout.path(shard, part)
            _link(base.folder / entry["file"], target)
            files[part] = {**entry, "file": f"{VECTORS}/{target.name}"}
        write_facts(layout.facts_path(shard), {**facts, "files": files})


def _link(source: Path, target: Path) -> None:
    temporary = temporary_name(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
            to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
