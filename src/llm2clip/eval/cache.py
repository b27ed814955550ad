"""Vectors of images and texts kept on disk by the model that gave them, so that a second benchmark costs nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.artifacts import atomic_path, file_digest
from llm2clip.data.sample import ImageRef
from llm2clip.errors import ArtifactError
from llm2clip.eval.foreign import OPEN_CLIP, VECTORS
from llm2clip.on_hub import cached_folder

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model", ".py", ".jinja")
"""Endings of the files that make a model what it is."""


def model_digest(models: Iterable[tuple[str | None, str | None]], arithmetic: str) -> str:
    """What changes when models would give other vectors: of files the bytes, of Hub ids the commit.

    Args:
        models: names, each with its revision.
        arithmetic: see `arithmetic_of`.

    >>> one = model_digest([("open_clip:a/b", None)], "fp32")
    >>> one == model_digest([("open_clip:a/b", None)], "fp32") != model_digest([("open_clip:a/c", None)], "fp32")
    True
    """
    digest = hashlib.blake2b(arithmetic.encode(), digest_size=12)
    for name, revision in models:
        for fact in _facts(name, revision) if name else [""]:
            digest.update(repr(fact).encode())
    return digest.hexdigest()


def _facts(name: str, revision: str | None) -> Iterator[tuple[str, str]]:
    """What is opened by a name: files and their digests; or a Hub id and its commit, else its revision."""
    place = name
    for prefix in (VECTORS, OPEN_CLIP, "local-dir:", "hf-hub:"):
        place = place.removeprefix(prefix)
    folder, weights = Path(place), Path(name.partition("/")[2] if name.startswith(OPEN_CLIP) else "")
    if folder.is_dir():
        endings = (".npy", ".txt", ".jsonl") if name.startswith(VECTORS) else WEIGHTS
        for file in sorted(folder.rglob("*")):
            if file.suffix in endings and file.is_file():
                yield str(file.relative_to(folder)), file_digest(file)
    elif weights.is_file():
        yield name, file_digest(weights)
    else:
        snapshot = cached_folder(place, revision)
        yield name, snapshot.name if snapshot else str(revision)


def arithmetic_of(model: Any, precision: str, device: torch.device) -> str:
    """In what a model computes: "auto" is another thing on another device."""
    parts = getattr(model, "parts", [getattr(model, "model", None)])
    weights = [weight for part in parts if isinstance(part, torch.nn.Module) for weight in part.parameters()]
    return " ".join([precision, device.type, *sorted({str(weight.dtype) for weight in weights})])


class Features:
    """The vectors of one model in a folder.

    Args:
        folder: of all models' vectors.
        model: its digest.

    Raises:
        ArtifactError: if a file in it is damaged.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder / model
        self._rows: dict[str, np.ndarray] = {}
        self._new: dict[str, np.ndarray] = {}
        for names in sorted(self._folder.glob("*.json")):
            try:
                keys = json.loads(names.read_text(encoding="utf-8"))
                rows = np.load(names.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
                self._rows.update(zip(keys, rows, strict=True))
            except (OSError, ValueError) as error:
                raise ArtifactError(f"{names.with_suffix('')} is damaged ({error}); delete {self._folder}") from None

    def get(self, key: str) -> np.ndarray | None:
        """The vector of an image or text, if it is known."""
        found = self._rows.get(key)
        return self._new.get(key) if found is None else found

    def put(self, key: str, vector: np.ndarray) -> None:
        """Keep one until it is saved."""
        self._new[key] = vector

    def save(self) -> None:
        """Write what is new, as files of its own."""
        if not self._new:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.blake2b("".join(self._new).encode(), digest_size=8).hexdigest()
        with atomic_path(self._folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, np.stack(list(self._new.values())))
        with atomic_path(self._folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(list(self._new)), encoding="utf-8")
        self._rows |= self._new
        self._new = {}


def image_key(image: ImageRef) -> str:
    """What changes when an image's place, or the file that it lies in, does."""
    try:
        facts = os.stat(image.path)
    except OSError:
        return ""
    return _key("image", image.path, image.offset, image.length, image.column, facts.st_size, facts.st_mtime_ns)


def text_key(text: str) -> str:
    """Of a text as it stands."""
    return _key("text", text)


def _key(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
