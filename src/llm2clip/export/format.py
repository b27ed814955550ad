"""What an export format is, and the one that a name stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llm2clip.export import formats
from llm2clip.parts import find_part, part_names

if TYPE_CHECKING:
    import torch

    from llm2clip.pipeline import LLM2CLIP

Vectors: TypeAlias = dict[str, np.ndarray]
"""float32 [n, ...] of the probes, by what was encoded: "image", "text"."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a folder of one format is: how it is written, what it must give, how it is loaded, what its card says.

    Attributes:
        title: the card's heading.
        library, task: the card's `library_name` and `pipeline_tag`.
        contents: what the folder holds, a sentence; `{name}` stands for a fact of the manifest.
        use: the card's code that runs, in the same way (Jinja).
        write: writes the model into an empty folder.
        expect: the model's own vectors of the probes.
        reload: the same from the written folder; takes the folder, the manifest's facts, `device` and `in_float32`
            (compute so, whatever the weights are saved in).
        needs_teacher: whether the folder holds the teacher.
    """

    title: str
    library: str
    task: str
    contents: str
    use: str
    write: Callable[[LLM2CLIP, Path], None]
    expect: Callable[[LLM2CLIP], Vectors]
    reload: Callable[[Path, dict[str, Any], torch.device, bool], Vectors]
    needs_teacher: bool = False


def format_names() -> list[str]:
    """What `--to` can be."""
    return part_names(formats)


def find_format(name: str) -> Format:
    """The format of a name."""
    found: Format = find_part(formats, name, "FORMAT")
    return found
