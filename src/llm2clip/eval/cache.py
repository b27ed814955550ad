"""Vectors of images and texts kept on disk by the model that gave them, so that a second benchmark costs nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llm2clip.artifacts import atomic_path
from llm2clip.data.sample import ImageRef
from llm2clip.errors import ArtifactError

WEIGHTS = (".safetensors", ".json", ".txt", ".model", ".py", ".jinja")
"""Endings of the files that make a model what it is."""
BLOCK = 1 << 24
"""Bytes hashed at a time."""


def model_digest(models: Iterable[tuple[str | None, str | None]], precision: str) -> str:
    """What changes when models would give other vectors: of folders the files in them, of Hub ids the commit.

    Args:
        models: names, each with its revision.
        precision: their arithmetic.

    >>> one = model_digest([("open_clip:a/b", None)], "fp32")
    >>> one == model_digest([("open_clip:a/b", None)], "fp32") != model_digest([("open_clip:a/c", None)], "fp32")
    True
    """
    digest = hashlib.blake2b(precision.encode(), digest_size=12)
    for name, revision in models:
        path = Path((name or "").rpartition("local-dir:")[2])
        if not name or not path.is_dir():
            digest.update(repr((name, _commit(name, revision))).encode())
            continue
        for file in sorted(path.rglob("*")):
            if file.suffix in WEIGHTS and file.is_file():
                digest.update(str(file.relative_to(path)).encode())
                with file.open("rb") as opened:
                    while block := opened.read(BLOCK):
                        digest.update(block)
    return digest.hexdigest()


def _commit(name: str | None, revision: str | None) -> str:
    """The commit of a Hub id's files on this machine, as the Hub's cache names their folder; else the revision."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name or "", revision=revision, local_files_only=True)).name
    except (OSError, ValueError):
        return str(revision)


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
