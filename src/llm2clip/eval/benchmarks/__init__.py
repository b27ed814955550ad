"""The named benchmarks: one file each, found by its name; nothing else knows of them.

A file here holds `CARD`, an `llm2clip.eval.card.Card`, and `read`, which takes an `llm2clip.eval.places.Place` and
gives the rows of the benchmark as the protocol has them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm2clip.config import check_choice
from llm2clip.errors import UsageError, setting
from llm2clip.parts import part_names


def check_benchmarks(names: Sequence[str], root: str | None, *, flag: str = "benchmark", place: str = "root") -> None:
    """Check names of benchmarks, and that a folder of their files is given.

    Args:
        names: what the setting `flag` holds.
        root: what the setting `place` holds.

    Raises:
        UsageError: for a name that there is not, or names without a folder.
    """
    for name in names:
        check_choice(setting(flag), name, part_names(sys.modules[__name__]))
    if names and root is None:
        raise UsageError(f"{setting(flag)} {names[0]} takes {setting(place, 'DIR')}, its files")
