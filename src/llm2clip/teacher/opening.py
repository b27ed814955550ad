"""From a name to the folder of a text model, and one line for whatever is none."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from llm2clip.artifacts import MANIFEST, RUN, read_json
from llm2clip.errors import ArtifactError, LLM2CLIPError, UsageError
from llm2clip.teacher.fingerprint import model_parts

VISION_HINTS = ("vision", "vit", "dino", "siglip", "clip", "eva", "swin", "convnext", "resnet", "timm")
PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
LLM2VEC_CLASS = re.compile(r"(Llama|Mistral|Gemma|Qwen2)(Bi\w*|Encoder)Model")
"""LLM2Vec's two-way classes: the plain model of transformers, same weights, without the causal mask."""


def resolve_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: itself, or the snapshot of a Hub id (downloaded if need be)."""
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UsageError(f"{name} is no folder; give the folder of a model, or a Hub id such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download

    with one_line_errors(path_or_id):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.gguf", "*.onnx", "original/*"]))


def check_is_text_model(folder: Path, name: str | Path) -> None:
    """Raise if `folder` holds something else than a text model.

    Raises:
        UsageError: saying what it holds.
        ArtifactError: if it is a teacher that is not finished.
    """
    if (folder / RUN).exists() and not (folder / MANIFEST).exists():
        raise ArtifactError(f"{name} is unfinished: run the command that makes it again, it goes on where it stopped")
    if (folder / MANIFEST).exists():
        kind = str(read_json(folder / MANIFEST).get("format", "")).removeprefix("llm2clip/")
        if kind not in ("teacher", ""):
            raise UsageError(
                f"{name} is no teacher (found: {kind}); give the folder that train-teacher made, or an LLM"
            )
    check_no_pickle(folder, name)
    if (folder / "modules.json").exists():
        return
    if not (folder / "config.json").exists():
        raise UsageError(f"{name} is no model: it holds no config.json; give an LLM's folder or Hub id")
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type", ""))
    architectures = " ".join(config.get("architectures") or [])
    if any(hint in (kind + architectures).lower() for hint in VISION_HINTS) and "vocab_size" not in config:
        raise UsageError(f"{name} is a vision model ({kind or architectures}), not a language model; give an LLM")
    if not kind:
        raise UsageError(f"{name} is no transformers model: its config.json has no model_type")


def check_no_pickle(folder: Path, name: str | Path) -> None:
    """Raise if the weights of a model, or of one of its modules, lie in a pickle: reading one can run any code.

    Raises:
        UsageError: naming the file.
    """
    for part in model_parts(folder):
        pickles = [path for pattern in PICKLES for path in part.glob(pattern)]
        if pickles and not any(part.glob("*.safetensors")):
            raise UsageError(
                f"{name} keeps its weights in a pickle ({pickles[0].relative_to(folder)}), which is never loaded; give "
                "a model with safetensors, or have save_pretrained write this one again where you trust it"
            )


def is_decoder(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a decoder LLM, which attends causally unless told otherwise."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    architectures = " ".join(config.get("architectures") or [])
    if "CausalLM" in architectures or "LMHead" in architectures:
        return True
    kind = config.get("model_type", "")
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_from_llm2vec(config: dict[str, Any]) -> bool:
    """Whether a `config.json` names a two-way class of LLM2Vec, as those of the released LLM2CLIP teachers do.

    Their code was written for transformers 4.40 to 4.46 and is not needed: with `is_causal` off, the plain model is
    the same.
    """
    named = [*(config.get("architectures") or []), *map(str, (config.get("auto_map") or {}).values())]
    return any(LLM2VEC_CLASS.fullmatch(name.rsplit(".", 1)[-1]) for name in named)


class _LoadReport(logging.Filter):
    """Keeps to itself what transformers says while a model is loaded, and the weights that it reports as missing."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Note the missing weights; nothing is shown."""
        rows = [[re.sub(r"\x1b\[\d*m", "", cell).strip() for cell in line.split("|")] for line in _lines_of(record)]
        self.missing += [row[0] for row in rows if len(row) > 1 and row[1] == "MISSING"]
        return False


def _lines_of(record: logging.LogRecord) -> list[str]:
    return record.getMessage().splitlines()


@contextlib.contextmanager
def one_line_errors(name: str | Path) -> Iterator[None]:
    """Turn what loading a model from `name` may raise into one line; loading itself is kept quiet.

    Transformers would report the LLM's output layer as an unexpected weight, each time, and only report, not refuse, a
    checkpoint that lacks weights: it draws them at random. Poolers may be missing: many encoders are saved without.

    Raises:
        UsageError: if the model cannot be loaded, or lacks weights.
    """
    verbosity, report = transformers_logging.get_verbosity(), _LoadReport()
    transformers_logging.set_verbosity_error()
    loading = logging.getLogger("transformers.modeling_utils")
    level = loading.level
    loading.setLevel(logging.WARNING)
    loading.addFilter(report)
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, SafetensorError) as error:
        if isinstance(error, (LLM2CLIPError, torch.OutOfMemoryError)):
            raise
        detail = " ".join(str(error).split())[:300]
        raise UsageError(f"{name} cannot be loaded as a text model: {detail}") from error
    finally:
        loading.removeFilter(report)
        loading.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
    missing = [weight for weight in report.missing if "pooler" not in weight]
    if missing:
        raise UsageError(
            f"{name} lacks weights of its model, such as {missing[0]} ({len(missing)} in all); get its files again"
        )
