"""What a training takes, whether it can learn, and whether it did: from its sizes, its first steps, and its log."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from llm2clip.errors import setting
from llm2clip.progress import human_bytes

FEWEST = {"teacher": 40, "student": 48}
"""Steps of the shortest trainings that were seen to learn, those of the demo (docs/lab-notes.md): from pretrained mini
models, at rates of 2e-3. At the defaults' lower rates it takes more."""
ENOUGH = 300
"""Steps that were seen to learn at the default rates (docs/student.md, "Learning rates"); what is advised."""
PASS_STEPS, SMALLEST_BATCH = 4, 16
"""A pass over the data of fewer steps is one of too large batches; smaller ones than 16 have too few negatives."""
LIKE_GUESSING, UNMOVED = 0.95, 0.97
"""From which part of a guesser's loss, or of the first one, on a loss is said to be the same. Loss says nothing alone:
the demo's stage 1 ends above neither, its collapsed runs (docs/teacher.md) above both."""
FAR_FROM_LEARNED = 0.5
"""A loss that does not move is no fault below this part of a guesser's: what goes on well had learned before."""
TIMES_CHANCE = 3
"""What finds less than so many times what a guesser does is near chance: of ten steps a guesser finds some ten of what
it seeks, give or take three."""
LAST_STEPS = 10
"""Steps at the beginning and the end whose means are compared; of a short run a third of its steps."""
LOG_BYTES = 200
"""A step's line in `log.jsonl`, at most."""


def too_few_steps(
    kind: str,
    sizes: Sequence[int],
    *,
    steps: int,
    batch_size: int,
    by_steps: bool = False,
    accumulate: int = 1,
    num_processes: int = 1,
) -> str:
    """A warning if a training is too short to learn anything, with what to type; empty if it is not.

    Args:
        kind: "teacher" or "student".
        sizes: images, or rows, of each of its sources.
        steps: it will take.
        by_steps: their number was given, and not that of passes.
        accumulate: batches a step.

    >>> too_few_steps("teacher", [1100], steps=4, batch_size=256)
    '4 steps of 256; a teacher needs some hundreds: give epochs=80'
    """
    if steps >= FEWEST[kind]:
        return ""
    more = more_steps(
        sizes, batch_size=batch_size, by_steps=by_steps, accumulate=accumulate, num_processes=num_processes
    )
    number = f"{steps} step{'' if steps == 1 else 's'} of {batch_size:,}"
    return f"{number}; a {kind} needs some hundreds: give {more}"


def more_steps(
    sizes: Sequence[int], *, batch_size: int, by_steps: bool = False, accumulate: int = 1, num_processes: int = 1
) -> str:
    """What to type for `ENOUGH` steps: passes, rounded up to one digit, and smaller batches where a pass has few.

    >>> more_steps([300], batch_size=300), more_steps([300], batch_size=300, by_steps=True)
    ('batch_size=64 epochs=80', 'steps=300')
    """
    if by_steps:
        return setting("steps", ENOUGH)
    smaller = batch_size
    if sum(sizes) < PASS_STEPS * batch_size:
        power = 1 << max(0, (sum(sizes) // PASS_STEPS).bit_length() - 1)
        smaller = min(batch_size, max(SMALLEST_BATCH, power) // num_processes * num_processes or num_processes)
    passes = ENOUGH * accumulate / max(1, sum(size // smaller for size in sizes))
    digit = 10 ** max(0, math.floor(math.log10(passes)))
    epochs = setting("epochs", math.ceil(passes / digit) * digit)
    return epochs if smaller == batch_size else f"{setting('batch_size', smaller)} {epochs}"


def training_bytes(learning: int, whole: int, *, checkpoints: int, steps: int, others: int = 0) -> int:
    """Bytes on the disk that a training takes at most: checkpoints, the finished model, and its log.

    Args:
        learning: bytes of the weights that learn; a checkpoint has AdamW's two moments of them beside.
        whole: bytes of all weights.
        checkpoints: how many there are at a time, the one being written included.
        others: further bytes in each checkpoint.
    """
    return checkpoints * (3 * learning + others) + whole + LOG_BYTES * steps


def needs(device: Any, disk: int) -> str:
    """The memory taken so far and the bytes on the disk, for a log: "6 GB of memory, 1.2 GB on disk".

    Args:
        device: whose memory it is: of a GPU what torch has allocated at most, otherwise what this process has held.
    """
    if device is not None and device.type == "cuda":
        import torch

        memory = f"{human_bytes(torch.cuda.max_memory_allocated(device))} of GPU memory"
    else:
        peak = _peak_memory()
        memory = f"{human_bytes(peak)} of memory" if peak else ""
    return ", ".join(filter(None, [memory, f"{human_bytes(disk)} on disk"]))


def _peak_memory() -> int:
    """Bytes that this process has held at most, 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The means of a run's first and last values.

    >>> ends([4.0, 3.0, 2.0, 1.0])
    (4.0, 1.0)
    """
    number = max(1, min(LAST_STEPS, len(values) // 3))
    return sum(values[:number]) / number, sum(values[-number:]) / number


def has_not_moved(first: float, last: float, *, guessing: float) -> bool:
    """Whether a softmax loss is one of a model that has learned nothing.

    Args:
        guessing: the loss of who guesses, ln of the number of choices.

    >>> has_not_moved(6.1, 4.85, guessing=math.log(128)), has_not_moved(4.9, 1.7, guessing=math.log(128))
    (True, False)
    """
    return last >= LIKE_GUESSING * guessing or last >= max(UNMOVED * first, FAR_FROM_LEARNED * guessing)


def near_chance(share: float, choices: int) -> bool:
    """Whether one of `choices` is found about as often as by who guesses; of too few choices nobody can say.

    >>> near_chance(0.012, 128), near_chance(0.05, 128)
    (True, False)
    """
    return share < TIMES_CHANCE / choices <= 0.5


def has_gained(before: float, after: float, number: int) -> bool:
    """Whether a share of `number` rose by more than two standard errors.

    >>> has_gained(0.088, 0.718, 400), has_gained(0.088, 0.105, 400)
    (True, False)
    """
    return after - before > 2 * math.sqrt(max(after * (1 - after), before * (1 - before)) / number)


def learned_nothing(kind: str, first: float, last: float, *, guessing: float | None, found: str, advice: str) -> str:
    """The warning at the end of a training that has learned nothing.

    Args:
        first: the loss at the start, `last` at the end, and `guessing` that of who guesses, if it is known.
        found: the accuracy beside a guesser's, in words.
        advice: what to do.
    """
    guess = "" if guessing is None else f", {guessing:.4g} for who guesses"
    what = f"the {kind} has learned nothing: its loss is {last:.4g}, {first:.4g} at the start{guess}"
    return f"{what}; {found}; {advice}" if found else f"{what}; {advice}"
