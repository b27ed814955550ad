"""What is mixed in training: banks of one teacher, and kinds of caption by weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from llm2clip.bank.reader import Bank
from llm2clip.config import check_choice
from llm2clip.data.images import load_image
from llm2clip.errors import UsageError, setting
from llm2clip.student.order import Mixture, ShuffledOrder
from llm2clip.student.remote import RemoteOrder, shard_starts

PAPER_BATCH = 4096


def check_banks(banks: Sequence[Bank]) -> None:
    """Check that banks can be mixed.

    Raises:
        UsageError: if there is none, one is empty, or they are of different teachers.
    """
    if not banks:
        raise UsageError(
            f"no bank to draw from: give {setting('bank', ('DIR',))}, with a weight above 0 if "
            f"{setting('bank_weights')} is given"
        )
    for bank in banks:
        if not bank.num_samples:
            raise UsageError(f"{setting('bank')} {bank.folder} holds no samples; leave it out")
        config = bank.manifest["config"]
        if config.get("text_only") or config.get("benchmark"):
            raise UsageError(
                f"{setting('bank')} {bank.folder} holds captions without images; give it as "
                f"{setting('inherit_bank', (str(bank.folder),))}"
            )
        check_teacher(bank, banks[0])


def check_teacher(bank: Bank, first: Bank) -> None:
    """Check that `bank` is of the teacher of `first`.

    Raises:
        UsageError: if not.
    """
    if bank.teacher_fingerprint != first.teacher_fingerprint:
        raise UsageError(
            f"{setting('bank')} {bank.folder} is of teacher {bank.teacher_fingerprint}, {first.folder} of "
            f"{first.teacher_fingerprint}; build both with one teacher"
        )


def check_batch_size(batch_size: int, num_processes: int, *, num_samples: int) -> None:
    """Check that a batch divides among the processes and has no image twice.

    Raises:
        UsageError: if not.
    """
    if batch_size % num_processes:
        fit = batch_size // num_processes * num_processes or num_processes
        raise UsageError(
            f"{setting('batch_size')} {batch_size} does not divide among {num_processes} processes; take {fit}"
        )
    if batch_size > num_samples:
        raise UsageError(
            f"{setting('batch_size')} {batch_size} is above the {num_samples} images to draw from; lower it"
        )


def default_batch_size(num_samples: int, num_processes: int) -> int:
    """The paper's 4,096 images a step, or all there are if those are fewer; a multiple of the processes.

    >>> default_batch_size(10**6, 3), default_batch_size(300, 1), default_batch_size(300, 8)
    (4095, 300, 296)
    """
    return min(PAPER_BATCH, num_samples) // num_processes * num_processes


def wanted_kinds(banks: Sequence[Bank], mix: Mapping[str, float]) -> list[str]:
    """The kinds of caption to draw: those with a weight in `mix`, or all that there are.

    Raises:
        UsageError: if `mix` names a kind that no bank has, or a bank has none of its kinds.
    """
    there = sorted({kind for bank in banks for kind in bank.kinds})
    wanted = [
        check_choice(f"{setting('mix')}: kind of caption", kind, there) for kind, weight in mix.items() if weight > 0
    ]
    for bank in banks:
        if mix and not set(wanted) & set(bank.kinds):
            raise UsageError(
                f"{setting('bank')} {bank.folder} has captions of {', '.join(bank.kinds)}, but {setting('mix')} wants "
                f"{', '.join(wanted)}; give one of its kinds a weight, or leave the bank out"
            )
    return wanted or there


def kind_weights(bank: Bank, mix: Mapping[str, float]) -> list[float]:
    """The weight of each of the bank's kinds, in the order of their codes; all alike if `mix` is empty."""
    return [float(mix.get(kind, 0.0)) if mix else 1.0 for kind in bank.kinds]


def choose_captions(kinds: Sequence[int], weights: Sequence[float], draws: Sequence[float]) -> list[int]:
    """Which of a sample's captions to take: for each, its kind by weight among those there are, then one of that kind.

    No caption is taken twice before all were; none at all if no kind has a weight.

    Args:
        kinds: the kind of each caption.
        weights: of each kind.
        draws: two numbers in [0, 1) for each caption to take.

    >>> choose_captions([0, 1, 1], weights=[0.5, 0.5], draws=[0.4, 0.0, 0.6, 0.9])
    [0, 2]
    """
    wanted = [place for place, kind in enumerate(kinds) if weights[kind] > 0]
    chosen: list[int] = []
    pool: list[int] = []
    for kind_draw, caption_draw in zip(draws[::2], draws[1::2], strict=True):
        pool = pool or wanted.copy()
        if not pool:
            break
        present = sorted({kinds[place] for place in pool})
        kind = _by_weight(present, [weights[kind] for kind in present], kind_draw)
        places = [place for place in pool if kinds[place] == kind]
        chosen.append(places[int(caption_draw * len(places))])
        pool.remove(chosen[-1])
    return chosen


def _by_weight(values: Sequence[int], weights: Sequence[float], draw: float) -> int:
    """One of `values`, as often as its weight says."""
    left = draw * sum(weights)
    for value, weight in zip(values, weights, strict=True):
        left -= weight
        if left < 0:
            return value
    return values[-1]  # rounding


def open_order(
    banks: Sequence[Bank], *, weights: Sequence[float] | None, batch_size: int, seed: int, num_processes: int
) -> tuple[Mixture | RemoteOrder, Callable[..., Image.Image]]:
    """The order of batches, and what loads an image (`load_image`, or the same from remote shards)."""
    if any(shard_starts(bank) is not None for bank in banks):
        remote = RemoteOrder(banks, weights=weights, batch_size=batch_size, seed=seed, num_processes=num_processes)
        return remote, remote.load_image
    orders = [ShuffledOrder(bank.num_samples, seed=seed, name=str(i)) for i, bank in enumerate(banks)]
    return Mixture(orders, weights=weights, batch_size=batch_size, seed=seed), load_image
