"""What stage 1 reads: tasks of text pairs, mixed so that each batch comes from one task, in a seeded order.

Every task is written once as an Arrow file in the output folder and then read through a memory map: any order, for
sets larger than memory. A row of the captions' task is an image with its captions, of a text task a triplet.
"""

from __future__ import annotations

import hashlib
import math
import random
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from llm2clip.data.pairs import Kinds, draw_pair
from llm2clip.errors import UsageError, setting

Row = dict[str, Any]
Key = tuple[int, int, int]
"""Number of the task, of the pass over it, and of the row in it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows that pair texts, and how a pair is drawn from a row.

    Attributes:
        name: "captions", or the stem of a text task's file.
        rows: random access to the stored rows.
        instruction: put before each query; empty for none.
        negatives: whether a row has a negative: the one given, else a random text of another row.
    """

    name: str
    rows: Any
    instruction: str = ""
    negatives: bool = True
    kinds: Mapping[Kinds, float] | None = None
    same: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, *, seed: int, epoch: int) -> Row:
        """Texts and keys of row `index` in pass `epoch`: `query`, `positive`, perhaps `negative`, and `label`."""
        query, positive, negative = self._texts(index, seed=seed, epoch=epoch)
        texts, images = [query, positive], [index, index]
        if self.negatives and negative is not None:
            texts, images = [*texts, negative], [*images, -1]
        elif self.negatives:
            other = random.Random(f"negative/{seed}/{epoch}/{index}").randrange(len(self) - 1)
            other += other >= index
            texts.append(self._texts(other, seed=seed, epoch=epoch)[1])
            images.append(other)
        row: Row = dict(zip(("query", "positive", "negative"), texts, strict=False))
        row["label"] = [*map(text_key, texts), *images]
        return row

    def _texts(self, index: int, *, seed: int, epoch: int) -> tuple[str, str, str | None]:
        row = self.rows[index]
        if "positive" in row:
            return row["query"], row["positive"], row["negative"]
        captions: dict[str, list[str]] = {}
        for kind, text in zip(row["kinds"], row["texts"], strict=True):
            captions.setdefault(kind, []).append(text)
        if self.same:
            caption = random.Random(f"{seed}/{epoch}/{index}").choice(row["texts"])
            return caption, caption, None
        pair = draw_pair(captions, seed=seed, sample_id=str(index), epoch=epoch, weights=self.kinds)
        assert pair is not None, "rows without a pair are not stored"
        return *pair, None


class Mixture(Dataset[Row]):
    """The tasks as one dataset, indexed by the keys that `BatchOrder` yields."""

    def __init__(self, tasks: list[Task], *, seed: int) -> None:
        self.tasks, self.seed = tasks, seed

    def __getitem__(self, key: Key) -> Row:
        task, epoch, index = key
        return {"dataset_name": self.tasks[task].name, **self.tasks[task].draw(index, seed=self.seed, epoch=epoch)}


class BatchOrder(Sampler[list[Key]]):
    """The batches of a run: each from one task, its rows in an order that is new in each pass over the task.

    Without weights, a pass over the mixture has every full batch of every task once, shuffled; with weights each
    batch's task is drawn by them.

    Args:
        sizes: rows of each task.
        batch_size: rows a step.
        steps: batches in all.
        weights: of each task, or None for by size.
        num_parts: batches are yielded in this many equal parts, one for each process.
    """

    sampler = None  # read by accelerate
    drop_last = True

    def __init__(
        self,
        sizes: list[int],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        weights: list[float] | None = None,
        num_parts: int = 1,
    ) -> None:
        self.sizes, self.steps, self.seed, self.num_parts = sizes, steps, seed, num_parts
        self.global_batch_size, self.batch_size = batch_size, batch_size // num_parts
        self.weights = weights

    def __len__(self) -> int:
        return self.steps * self.num_parts

    def __iter__(self) -> Iterator[list[Key]]:
        used = [0] * len(self.sizes)
        orders: dict[int, tuple[int, np.ndarray]] = {}
        for _, task in zip(range(self.steps), self._tasks(), strict=False):
            epoch, number = divmod(used[task], self.sizes[task] // self.global_batch_size)
            used[task] += 1
            if task not in orders or orders[task][0] != epoch:
                shuffled = np.random.default_rng([self.seed, task, epoch]).permutation(self.sizes[task])
                orders[task] = (epoch, shuffled)
            start = number * self.global_batch_size
            for part in range(self.num_parts):
                rows = orders[task][1][start + part * self.batch_size :][: self.batch_size]
                yield [(task, epoch, int(row)) for row in rows]

    def _tasks(self) -> Iterator[int]:
        """The task of each step, without end."""
        generator = np.random.default_rng([self.seed, len(self.sizes)])
        whole = [size // self.global_batch_size for size in self.sizes]
        while True:
            if self.weights is None:
                block = generator.permutation(np.repeat(np.arange(len(whole)), whole))
            else:
                shares = np.array(self.weights) / sum(self.weights)
                block = generator.choice(len(whole), size=1024, p=shares)
            yield from map(int, block)


def count_steps(sizes: list[int], *, batch_size: int, epochs: float) -> int:
    """Steps of `epochs` passes over all full batches of all tasks, at least one."""
    return max(1, round(epochs * sum(size // batch_size for size in sizes)))


def check_sizes(tasks: list[Task], *, batch_size: int) -> None:
    """Raise if a task cannot fill a batch.

    Raises:
        UsageError: naming the task, its size and the batch size to give.
    """
    for task in tasks:
        if len(task) < batch_size:
            raise UsageError(
                f"{task.name} has {len(task)} usable rows, fewer than {setting('batch_size')} {batch_size}; "
                f"give {setting('batch_size', len(task))} or less, or more data"
            )


def task_weights(names: list[str], weights: Mapping[str, float]) -> list[float] | None:
    """The weight of each of the tasks `names`, in order, or None if none were given.

    Raises:
        UsageError: if a weight names no task, or a task has none.
    """
    if not weights:
        return None
    for name in weights:
        if name not in names:
            raise UsageError(
                f"{setting('source_weights', {name: weights[name]})}: no such task; there are {', '.join(names)}"
            )
    missing = [name for name in names if name not in weights]
    if missing or not all(0 <= weight < math.inf for weight in weights.values()) or not sum(weights.values()):
        raise UsageError(
            f"{setting('source_weights')}: give each task a weight, one of them above 0; {missing or dict(weights)} is "
            "wrong"
        )
    return [float(weights[name]) for name in names]


def parse_kinds(weights: Mapping[str, float]) -> dict[Kinds, float] | None:
    """`{"short+long": 2.0}` as `{("long", "short"): 2.0}`; None if empty.

    Raises:
        UsageError: if a name is no two kinds joined by "+", or a weight is negative or no number.
    """
    parsed: dict[Kinds, float] = {}
    for name, weight in weights.items():
        kinds = name.split("+")
        if len(kinds) != 2 or not all(kinds) or not 0 <= weight < math.inf:
            raise UsageError(
                f"{setting('pair_weights', {name: weight})}: write two kinds and a weight, as in "
                f"{setting('pair_weights', {'short+long': 1})}"
            )
        first, second = sorted(kinds)
        parsed[first, second] = weight
    return parsed or None


def text_key(text: str) -> int:
    """A number that is the same for texts equal up to case, punctuation and spacing.

    >>> text_key("A red disc.") == text_key("a red  disc")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded).split()
    plain = " ".join(words) or text
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "big", signed=True)
