"""What identifies a teacher: its weights and every setting that changes a vector, wherever its folder lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from llm2clip.artifacts import MANIFEST, file_digest, fingerprint, read_json
from llm2clip.errors import UsageError
from llm2clip.hub import ModelFolder, model_parts

# Facts about where and with what a file was written: they change no vector.
PLACE_KEYS = {"_name_or_path", "name_or_path", "transformers_version", "__version__", "base_model_name_or_path"}
SETTINGS_FILES = (
    "config.json",
    "modules.json",
    "router_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "joined_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096


def teacher_fingerprint(teacher: str | Path | SentenceTransformer) -> str:
    """16 hex digits, the same for the same teacher wherever it lies, other for other weights or settings.

    A folder made by llm2clip carries it in its manifest, which is trusted as long as the files' sizes and a sample of
    their bytes are the recorded ones; else all bytes are read (about 1 GB/s on a core).

    Args:
        teacher: a folder, or a model; one not loaded by `load_teacher` is identified by its weights in memory.

    Raises:
        UsageError: if `teacher` is a path that holds no model.
    """
    if isinstance(teacher, SentenceTransformer):
        origin = getattr(teacher, "_llm2clip_origin", None)
        if origin is None:
            return fingerprint(memory_digest(teacher))
        folder, settings = origin
        found = folder_fingerprint(folder.path, folder.manifest)
        return found if settings is None else fingerprint([found, settings])
    return folder_fingerprint(Path(teacher))


def remember_origin(
    teacher: SentenceTransformer, folder: ModelFolder, *, settings: dict[str, Any] | None = None
) -> None:
    """Note on `teacher` the folder it came from, and the settings it was given beyond those in the folder."""
    teacher._llm2clip_origin = (folder, settings)  # type: ignore[assignment]


def forget_origin(teacher: SentenceTransformer) -> None:
    """Note that `teacher` is no longer what its folder holds."""
    teacher._llm2clip_origin = None  # type: ignore[assignment]


def folder_fingerprint(folder: Path, manifest: Mapping[str, Any] | None = None) -> str:
    """The fingerprint of a model folder's files; `manifest` is its own, read here if it is not at hand.

    Raises:
        UsageError: if there is no such folder, or no weights in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; expected a teacher, a SentenceTransformer or an LLM")
    if manifest is None:
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    if "fingerprint" in manifest and manifest.get("files") == quick_digests(folder):
        return str(manifest["fingerprint"])
    return compute_fingerprint(folder)


def compute_fingerprint(folder: Path) -> str:
    """The fingerprint of a model folder, from all bytes of its weights."""
    weights = weight_files(folder)
    if not weights:
        raise UsageError(f"{folder} holds no model weights (*.safetensors)")
    facts = {str(path.relative_to(folder)): file_digest(path) for path in weights}
    return fingerprint([facts, settings_digests(folder)])


def quick_digests(folder: Path) -> dict[str, str]:
    """For each file that matters, its size and a digest of 64 blocks spread over it: enough to see a change."""
    files = [*weight_files(folder), *settings_files(folder)]
    return {str(path.relative_to(folder)): _sampled_digest(path) for path in sorted(files)}


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder and its modules."""
    return sorted(path for part in model_parts(folder) for path in part.glob("*.safetensors"))


def settings_files(folder: Path) -> list[Path]:
    """The files of a model folder and its modules that set how it encodes."""
    return [part / name for part in model_parts(folder) for name in SETTINGS_FILES if (part / name).exists()]


def settings_digests(folder: Path) -> dict[str, Any]:
    """What the settings files say, less where and with what version they were written."""
    found: dict[str, Any] = {}
    for path in settings_files(folder):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = fingerprint(_without_place(json.loads(path.read_text(encoding="utf-8"))))
        else:
            found[name] = file_digest(path)
    return found


def memory_digest(teacher: SentenceTransformer) -> list[Any]:
    """A digest of the weights of a model in memory, and its modules' settings."""
    digest = hashlib.sha256()
    weights: dict[str, Any] = teacher.state_dict()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    modules: list[Any] = list(teacher)
    settings = [module.get_config_dict() for module in modules if hasattr(module, "get_config_dict")]
    return [digest.hexdigest(), json.loads(json.dumps(settings, default=str)), teacher.prompts]


def _without_place(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_place(item) for key, item in value.items() if key not in PLACE_KEYS}
    return [_without_place(item) for item in value] if isinstance(value, list) else value


def _sampled_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(NUM_SAMPLES):
            file.seek(i * max(size - SAMPLE_BYTES, 0) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size}:{digest.hexdigest()[:16]}"
