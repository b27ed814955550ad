"""A peft folder as a teacher: the adapter merged into the weights of the model it was trained on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from llm2clip.artifacts import file_digest
from llm2clip.errors import UsageError
from llm2clip.hub import ADAPTER_CONFIG, ModelFolder, find_model, listed, one_line_errors

WEIGHTS = "adapter_model.safetensors"


def base_and_adapter(folder: ModelFolder) -> tuple[ModelFolder, ModelFolder | None]:
    """The model that an adapter's folder sits on, and the adapter; any other folder as it is, and None.

    Raises:
        UsageError: if the adapter does not say what it sits on, or that is not there.
    """
    if folder.kind != "adapter":
        return folder, None
    name = folder.config.get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{folder.name} is an adapter, and its {ADAPTER_CONFIG} does not say of which model")
    if not (folder.path / WEIGHTS).exists():
        raise UsageError(f"{folder.name} is an adapter without weights: it lacks {WEIGHTS}")
    if (kind := folder.config.get("peft_type")) != "LORA":
        raise UsageError(f"{folder.name} is an adapter of kind {kind}; give one of kind LORA, or merge it yourself")
    if whole := folder.config.get("modules_to_save"):
        raise UsageError(f"{folder.name} replaces whole modules ({listed(whole)}); merge it yourself")
    try:
        base = find_model(name, revision=folder.config.get("revision"))
    except UsageError as error:
        raise UsageError(f"{folder.name} is an adapter on {name}: {error}") from None
    if base.kind != "transformers":
        raise UsageError(f"{folder.name} is an adapter on {name}, which is no plain LLM; merge it yourself")
    return base, folder


def merged(model: Any, adapter: ModelFolder) -> Any:
    """`model` with an adapter's weights added into its own.

    Adapters may have been trained on the model with its output layer: their names have one `model.` more.

    Raises:
        UsageError: if the adapter does not fit; every weight of it must have its place.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    what = f"{adapter.name} cannot be merged into {adapter.config['base_model_name_or_path']}"
    with one_line_errors(what), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config: Any = PeftConfig.from_pretrained(str(adapter.path))
        config.inference_mode, config.auto_mapping, config.task_type = False, None, None
        adapted: Any = get_peft_model(model, config)
        state = load_file(adapter.path / WEIGHTS)
        deeper = "base_model.model.model."
        if all(name.startswith(deeper) for name in state) and not hasattr(model, "model"):
            state = {f"base_model.model.{name.removeprefix(deeper)}": value for name, value in state.items()}
        found: Any = set_peft_model_state_dict(adapted, state)
        lacking = [name for name in found.missing_keys if "lora_" in name]
        if lacking or found.unexpected_keys:
            wrong = f"lacks {lacking[0]}" if lacking else f"has no place for {listed(found.unexpected_keys)}"
            raise UsageError(f"{what}: it {wrong}")
        return adapted.merge_and_unload()


def adapter_digest(adapter: ModelFolder) -> list[str]:
    """What identifies an adapter beside its base: digests of its weights and settings."""
    files: list[Path] = [adapter.path / WEIGHTS, adapter.path / ADAPTER_CONFIG]
    return [file_digest(file) for file in files]
