"""What was wrong with single images and samples: skipped, counted by cause, and too many stop the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from llm2clip.errors import LLM2CLIPError, TooManyBadSamples, setting

logger = logging.getLogger("llm2clip")
MAX_EXAMPLES = 5
"""Samples named for each cause; the counts cover all."""
EARLY_SAMPLES = 1000
"""Samples to have seen before a run is stopped halfway: the first few may be bad by chance."""


class BadImage(LLM2CLIPError):
    """One image that cannot be used.

    Its `cause` is a short class of defects, for counting ("truncated image"), its `detail` the file and what the
    decoder said.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)  # both stay in args, so that it survives the way back from a worker process
        self.cause, self.detail = cause, detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


def _cut(text: str, most: int) -> str:
    """`text`, if somebody's data has not filled it with a novel."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


class BadSamples:
    """Counts defects by cause and keeps the first few of each as examples.

    A sample without a usable image or caption is bad; one that only lost a caption is not, but is counted too.

    The first of each cause is warned of, unless `quiet`.

    Example:
        >>> bad = BadSamples(0.5)
        >>> bad.add("0001", "empty image", "0001.jpg has 0 bytes")
        >>> bad.num_bad, bad.counts
        (1, {'empty image': 1})
        >>> bad.check(total=10)
    """

    def __init__(self, max_fraction: float, *, quiet: bool = False) -> None:
        self.max_fraction, self.quiet = max_fraction, quiet
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.num_bad = 0
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, sample_id: str, cause: str, detail: str = "") -> None:
        """Count a bad sample."""
        self.num_bad += 1
        self.note(sample_id, cause, detail)

    def note(self, sample_id: str, cause: str, detail: str = "") -> None:
        """Count a defect that leaves its sample usable, such as one empty caption beside good ones."""
        sample_id, detail = _cut(sample_id, 300), _cut(detail, 1000)
        if cause not in self.counts and not self.quiet:
            line = f"{sample_id}: {cause}{detail and f': {detail}'} (further ones are only counted)"
            # a file name that is no UTF-8 holds what a log in UTF-8 cannot
            logger.warning("%s", line.encode("utf-8", "backslashreplace").decode())
        self.counts[cause] = self.counts.get(cause, 0) + 1
        examples = self.examples.setdefault(cause, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"{sample_id}: {detail}" if detail else sample_id)

    def merge(self, other: BadSamples | Mapping[str, Any]) -> None:
        """Add the counts of another (or of its `to_json`)."""
        data = other.to_json() if isinstance(other, BadSamples) else other
        self.num_bad += data["num_bad"]
        for cause, count in data["counts"].items():
            self.counts[cause] = self.counts.get(cause, 0) + count
            room = MAX_EXAMPLES - len(self.examples.setdefault(cause, []))
            self.examples[cause] += data["examples"].get(cause, [])[: max(room, 0)]

    def to_json(self) -> dict[str, Any]:
        """For a manifest: how many samples were bad, defects by cause, and the first of each."""
        return json.loads(  # type: ignore[no-any-return]
            json.dumps({"num_bad": self.num_bad, "counts": self.counts, "examples": self.examples}, sort_keys=True)
        )

    def check(self, total: int, *, final: bool = True) -> None:
        """Raise TooManyBadSamples if the share of bad ones among `total`, good and bad, is above the limit.

        Unless all were seen (`final`), only a share among at least 1000 counts.
        """
        if total <= 0 or (not final and total < EARLY_SAMPLES) or self.num_bad <= self.max_fraction * total:
            return
        causes = sorted(self.counts, key=lambda cause: -self.counts[cause])
        listed = ", ".join(f"{self.counts[cause]} {cause}" for cause in causes[:4])
        raise TooManyBadSamples(
            f"{self.num_bad} of {total} samples are bad, above {setting('max_bad_fraction')} {self.max_fraction}: "
            f"{listed}; for example {causes[0]}: {self.examples[causes[0]][0]}"
        )
