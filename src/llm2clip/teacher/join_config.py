"""The settings of `join-teachers`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.config import to_dict
from llm2clip.errors import UsageError, setting


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Make one teacher of several: a caption's vector is theirs, each of unit length, one behind the other.

    An LLM and the text half of the CLIP whose tower will be trained: the paper's best scheme (table 9, d).
    """

    teachers: tuple[str, ...]
    """Two or more, folders or Hub ids: a teacher, an LLM, any SentenceTransformer, or a CLIP or SigLIP (its texts)."""
    out: Path
    """Folder of the joined teacher; made if it is not there."""
    weights: tuple[float, ...] = ()
    """Length of each teacher's part of the vector, in their order; by default 1 for all."""
    revisions: tuple[str, ...] = ()
    """Branch, tag or commit of each teacher, in their order ("main" for one that is a local folder)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teachers. Only for sources you trust."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            UsageError: for an impossible value or combination.
        """
        if len(self.teachers) < 2:
            raise UsageError(f"{setting('teachers')} names {len(self.teachers)}; give two or more to be joined")
        for name, values in (("weights", self.weights), ("revisions", self.revisions)):
            if values and len(values) != len(self.teachers):
                raise UsageError(
                    f"{setting(name)} has {len(values)} values for {len(self.teachers)} teachers; give one each"
                )
        for weight in self.weights:
            if not (weight > 0 and math.isfinite(weight)):
                raise UsageError(f"{setting('weights')} has {weight}; each must be above 0")

    def settings(self) -> dict[str, Any]:
        """The fields that decide what is written, JSON-ready."""
        return {key: value for key, value in to_dict(self).items() if key != "out"}
