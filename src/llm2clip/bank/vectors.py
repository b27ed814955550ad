"""The vectors on disk: arrays over all rows, filled shard by shard; a shard is whole once its JSON is there.

`vectors/vectors.npy`, `vectors/tokens.npy` and, for int8, `vectors/scale.npy` have their full size from the start. A
shard is a range of their rows; `vectors/N.json` (N in five digits) is written after them, with a checksum of each.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2clip.artifacts import atomic_path, write_json
from llm2clip.bank.dtypes import STORED, Stored, num_blocks, row_bytes
from llm2clip.errors import ArtifactError, LLM2CLIPError, setting

VECTORS = "vectors"


@dataclass(frozen=True)
class Layout:
    """Where the rows of a bank lie.

    Attributes:
        folder: the bank's.
        num_rows: distinct captions.
        shard_rows: rows of a shard; the last one may have fewer.
        dtype: how vectors are stored.
        dim: length of a vector.
    """

    folder: Path
    num_rows: int
    shard_rows: int
    dtype: str
    dim: int

    @property
    def arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each array, by its name."""
        arrays = {
            "vectors": (np.dtype(STORED[self.dtype]), (self.num_rows, self.dim)),
            "tokens": (np.dtype("int32"), (self.num_rows,)),
        }
        if self.dtype == "int8":
            arrays["scale"] = (np.dtype("float32"), (self.num_rows, num_blocks(self.dim)))
        return arrays

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return -(-self.num_rows // self.shard_rows)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def num_bytes(self) -> int:
        """Bytes of all vectors."""
        return self.num_rows * row_bytes(self.dtype, self.dim)

    def path(self, name: str) -> Path:
        """The file of an array."""
        return self.folder / VECTORS / f"{name}.npy"

    def facts_path(self, shard: int) -> Path:
        """The file that says that a shard is whole."""
        return self.folder / VECTORS / f"{shard:05d}.json"

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is made."""
        return self.facts_path(shard).exists()

    def prepare(self) -> None:
        """Make the files of the arrays, without content; if one was lost, all are made anew, and all shards with them.

        One process may call it while no other writes.
        """
        if all(self.path(name).exists() for name in self.arrays):
            return
        self.path("vectors").parent.mkdir(exist_ok=True)
        for shard in range(self.num_shards):  # first, or they would vouch for rows that are gone
            self.facts_path(shard).unlink(missing_ok=True)
        for name, (dtype, shape) in self.arrays.items():
            with atomic_path(self.path(name)) as temporary:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)

    def open(self, name: str) -> np.memmap[Any, Any]:
        """An array, memory-mapped for reading.

        Raises:
            ArtifactError: if its file is missing or another than it should be.
        """
        path, (dtype, shape) = self.path(name), self.arrays[name]
        try:
            array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; type the command that made its bank again") from None
        except (ValueError, EOFError):
            array = None
        size = path.stat().st_size
        if array is None or (array.dtype, array.shape, array.offset + array.nbytes) != (dtype, shape, size):
            found = "" if array is None else f"{array.dtype} {array.shape} in "
            raise ArtifactError(
                f"{path} is damaged: it holds {found}{size:,} bytes, expected {dtype} {shape}; delete it and type the "
                "command that made its bank again"
            )
        if hasattr(mmap, "MADV_RANDOM") and 2 * size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            array.base.madvise(mmap.MADV_RANDOM)  # most rows come from the disk: do not read 128 KB ahead for each
        return array  # type: ignore[no-any-return]


def checksum(array: NDArray[Any]) -> str:
    """The SHA-256 of an array's numbers, as they lie on the disk."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


class ShardBuffer:
    """The vectors of one shard in memory, filled in any order, then written at once."""

    def __init__(self, layout: Layout, shard: int) -> None:
        self.layout, self.shard, self.rows = layout, shard, layout.rows(shard)
        arrays = {name: np.zeros((len(self.rows), *shape[1:]), dtype) for name, (dtype, shape) in layout.arrays.items()}
        self.arrays, self.vectors, self.tokens = arrays, arrays["vectors"], arrays["tokens"]
        self.scale = arrays.get("scale")
        self.num_cut = 0

    def put(self, places: NDArray[np.int64], stored: Stored) -> None:
        """Set the vectors (and scales) of some rows, counted from the shard's first."""
        self.vectors[places] = stored[0]
        if self.scale is not None and stored[1] is not None:
            self.scale[places] = stored[1]

    def check(self, text_of: Callable[[int], str]) -> None:
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
            text = text_of(self.rows[int(bad.argmax())])
            raise LLM2CLIPError(
                f"the vector of caption {text[:60]!r} overflows {self.layout.dtype}; "
                f"use {setting('precision', 'fp32')} and {setting('dtype', 'float32')} in a new folder"
            )

    def write(self) -> dict[str, Any]:
        """Write the shard's rows, then its JSON, and return what that says."""
        for name, array in self.arrays.items():
            start = self.layout.open(name).offset + self.rows.start * array[0].nbytes
            with self.layout.path(name).open("r+b") as file:  # not by a map: on a full disk that kills the process
                file.seek(start)
                file.write(array.data)
                file.flush()
                os.fsync(file.fileno())
        facts = {
            "first": self.rows.start,
            "rows": len(self.rows),
            "tokens": int(self.tokens.sum()),
            "cut": self.num_cut,
            "sha256": {name: checksum(array) for name, array in self.arrays.items()},
        }
        write_json(self.layout.facts_path(self.shard), facts)
        return facts
