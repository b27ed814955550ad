"""The students that the paper's authors released: which there are, their teachers, and how a folder of one is known.

What is in them, and how they become students of ours, is in `llm2clip.student.official`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip.artifacts import MANIFEST, read_json

LLAMA_8B = "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
LLAMA_1B = "microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned"


class Released(NamedTuple):
    """A released student."""

    teacher: str | None
    """The teacher whose vectors it reads; None for the one whose teacher was not found public."""
    tower: str | None = None
    """The CLIP whose vision tower it was trained from, where that is on the Hub in transformers' format."""


RELEASED = {
    "microsoft/LLM2CLIP-Openai-B-16": Released(LLAMA_8B, "openai/clip-vit-base-patch16"),
    "microsoft/LLM2CLIP-Openai-L-14-224": Released(LLAMA_8B, "openai/clip-vit-large-patch14"),
    "microsoft/LLM2CLIP-Openai-L-14-336": Released(LLAMA_8B, "openai/clip-vit-large-patch14-336"),
    "microsoft/LLM2CLIP-EVA02-B-16": Released(LLAMA_8B),
    "microsoft/LLM2CLIP-EVA02-L-14-336": Released(LLAMA_8B),
    "microsoft/LLM2CLIP-Llama3.2-1B-EVA02-L-14-336": Released(LLAMA_1B),
    "microsoft/LLM2CLIP-Llama3.1-8B-siglip2-so400m-patch14-224": Released(None),
}
CLASSES = ("LLM2CLIPModel", "EvaCLIPModel")
"""What their `config.json` names, in code of their own that is not run."""


def released(name: str) -> Released | None:
    """What is known of a released student, by its Hub id, or by the folder of a download named like it.

    >>> released("downloads/LLM2CLIP-Llama3.2-1B-EVA02-L-14-336").teacher
    'microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned'
    """
    last = {each.rsplit("/", 1)[1].lower(): found for each, found in RELEASED.items()}
    return last.get(Path(name).name.lower())


def is_released(config: Mapping[str, Any], files: Iterable[str]) -> bool:
    """Whether a model with this `config.json` (empty without one) and these files is laid out as released students are.

    Those of the authors' training code, some with nothing beside them, are a `.pt` with tower and adaptor.

    >>> is_released({"architectures": ["LLM2CLIPModel"]}, []), is_released({}, ["LLM2CLIP-EVA02-B-16.pt", "README.md"])
    (True, True)
    """
    named = [*(config.get("architectures") or []), *map(str, (config.get("auto_map") or {}).values())]
    if any(name.rsplit(".", 1)[-1] in CLASSES for name in named):
        return True
    names = list(files)
    others = {"config.json", "modules.json", "adapter_config.json", MANIFEST}
    return not config and bool(fnmatch.filter(names, "*.pt")) and not others & set(names)


def weight_files(config: Mapping[str, Any], files: Iterable[str]) -> list[str]:
    """Of a released student's files those that hold its weights, in one format: no file is read that is not needed.

    Of EVA02 the `.pt` alone holds the adaptor. Else safetensors come first.

    >>> weight_files({"architectures": ["EvaCLIPModel"]}, ["pytorch_model.bin", "LLM2CLIP-EVA02-B-16.pt"])
    ['LLM2CLIP-EVA02-B-16.pt']
    """
    names = sorted(name for name in files if "/" not in name)
    formats = ["*.pt", "*.safetensors", "*.bin"]
    if any("LLM2CLIPModel" in str(name) for name in config.get("architectures") or []):
        formats = ["*.safetensors", "*.bin", "*.pt"]
    return next((found for each in formats if (found := fnmatch.filter(names, each))), [])


def known_teacher(name: str | Path) -> str | None:
    """The teacher of a released student, or of a folder that `llm2clip convert` made of one; None if none is known."""
    manifest = Path(name) / MANIFEST
    if manifest.is_file():
        found = read_json(manifest).get("teacher")
        return found if isinstance(found, str) else None
    known = released(str(name))
    return None if known is None else known.teacher
