"""What a name and a machine stand for: the folder of a model, and the device with the arithmetic it is good at.

A model's name is resolved here and nowhere else, once a verb: the `ModelFolder` is what is handed on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from llm2clip.artifacts import MANIFEST, RUN, check_finished, made_as, read_json
from llm2clip.compat import cpu_has_bf16
from llm2clip.errors import LLM2CLIPError, UsageError, one_line, shortened
from llm2clip.on_hub import MODULE_FOLDER, check_no_pickle, model_folder
from llm2clip.released import is_released

Config = TypeVar("Config")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of each precision that a setting can name, but for "auto"."""
STUDENT_CONFIG = "student_config.json"
"""What an exported bundle keeps of its student's config; no other SentenceTransformer has it."""
ADAPTER_CONFIG = "adapter_config.json"
"""What peft writes beside an adapter's weights."""
LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, ImportError, SafetensorError),
    *(AttributeError, IndexError, KeyError, TypeError),
)
"""What loading a damaged or foreign model, and trying it, raises."""


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a model, found, checked and read once; whatever opens the model takes this.

    Attributes:
        path: where it lies on this machine; of a Hub id, its snapshot.
        name: the folder or Hub id as it was given, for messages.
        kind: "student" or "bundle" (both ours; a bundle holds its teacher too), "sentence-transformers" (our teachers
            are such), "adapter" (peft's, on another model's weights), "released" (a student of the paper's authors,
            see `llm2clip.released`) or "transformers".
        config: its config.json, of an adapter its adapter_config.json; empty without one.
        manifest: its manifest.json, if llm2clip made it; else empty.

    Example:
        >>> find_model("student").kind                                                  # doctest: +SKIP
        'student'
    """

    path: Path
    name: str
    kind: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def made(self) -> str:
        """What llm2clip calls it: "teacher", "student", "export", ...; "" for a model of another origin."""
        return made_as(self.manifest)


def find_model(name: str | Path | ModelFolder, *, revision: str | None = None) -> ModelFolder:
    """The folder of a model, downloaded for a Hub id; one that is found already is returned as it is.

    Args:
        name: a folder, or a Hub id (org/name).
        revision: branch, tag or commit of a Hub id.

    Raises:
        UsageError: if there is no model, or its weights are a pickle.
        ArtifactError: if it is not finished, or its config.json or manifest.json is damaged.
    """
    if isinstance(name, ModelFolder):
        return name
    path = model_folder(str(name), revision=revision)
    check_finished(path, str(name))
    config, manifest = (read_json(path / file) if (path / file).exists() else {} for file in ("config.json", MANIFEST))
    if is_released(config, (file.name for file in path.iterdir())):
        return ModelFolder(path, str(name), "released", config, manifest)  # its pickles are read for tensors alone
    if (path / "modules.json").exists():
        kind = "bundle" if (path / STUDENT_CONFIG).exists() else "sentence-transformers"
    elif not config and (path / ADAPTER_CONFIG).exists():
        kind, config = "adapter", read_json(path / ADAPTER_CONFIG)
    elif not config:
        found = made_as(manifest)
        raise UsageError(f"{name} is no model: it holds {f'a {found}' if found else 'no config.json'}")
    else:
        kind = "student" if config.get("model_type") == "llm2clip" else "transformers"
    inside = (file for part in model_parts(path) for file in part.iterdir())
    check_no_pickle([file.relative_to(path).as_posix() for file in inside], str(name))
    return ModelFolder(path, str(name), kind, config, manifest)


def model_parts(folder: Path) -> Iterator[Path]:
    """The model's folder and those of its modules, but no checkpoint, adapter or export that lies beside them."""
    yield folder
    for module in sorted(path for path in folder.iterdir() if path.is_dir() and MODULE_FOLDER.fullmatch(path.name)):
        yield from model_parts(module)


def compare_weights(model: torch.nn.Module, folder: Path) -> tuple[list[str], list[str]]:
    """The weights of the transformers models in `model` that the files in `folder` lack, and those they hold beyond.

    What is lacking was drawn at random. Each part is opened once more without its numbers, by the class that `model`
    has for it, for transformers to say so. Poolers may be missing: many encoders are saved without. An LLM's output
    layer may be there: most are saved with it.
    """
    from transformers import PreTrainedModel

    classes: dict[str, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            classes.setdefault(module.config.model_type, type(module))
    missing: list[str] = []
    left: list[str] = []
    for part in model_parts(folder):
        config = read_json(part / "config.json") if (part / "config.json").exists() else {}
        kind = config.get("model_type", "")
        # weights saved in 4 or 8 bits are not opened so: their quantizer may ask for a GPU
        if kind in classes and "quantization_config" not in config and any(part.glob("*.safetensors")):
            options: dict[str, Any] = {"device_map": "meta", "output_loading_info": True, "use_safetensors": True}
            with quiet_transformers(bars=False):
                _, report = classes[kind].from_pretrained(part, **options)
            missing += sorted(name for name in report["missing_keys"] if "pooler" not in name)
            left += sorted(name for name in report["unexpected_keys"] if not name.startswith("lm_head."))
    return missing, left


def listed(names: Iterable[str]) -> str:
    """Names of weights by their first part, as a message lists them.

    >>> listed(["text_model.a.weight", "text_model.a.bias", "logit_scale"])
    'logit_scale, text_model (2 weights)'
    """
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(name if number == 1 else f"{name} ({number} weights)" for name, number in sorted(counts.items()))


def drop_remote_code(model: torch.nn.Module) -> None:
    """Let the configs in `model` name no code of others where transformers' own classes run, so that none is saved.

    A folder that names some is not opened without a network and `trust_remote_code`, or runs it.
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module).__module__.startswith("transformers."):
            module.config.architectures = [type(module).__name__]
            for config in (module.config, *vars(module.config).values()):
                if isinstance(config, PreTrainedConfig):
                    vars(config).pop("auto_map", None)
        tokenizer: Any = getattr(module, "tokenizer", None)
        if type(tokenizer).__module__.startswith("transformers."):
            tokenizer.init_kwargs.pop("auto_map", None)


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = True) -> Iterator[None]:
    """Of what transformers logs the errors alone, and its progress bars only if `bars`; afterwards all is as before."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn what transformers may raise about a model into a UsageError of one line, which begins with `what`.

    Our own errors, and that of a GPU's full memory, stay what they are.
    """
    try:
        yield
    except LOAD_ERRORS as error:
        if isinstance(error, (LLM2CLIPError, torch.OutOfMemoryError)):
            raise
        raise UsageError(f"{what}: {shortened(str(error)) or type(error).__name__}") from error


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, if it is there; by default the GPU of the process's local rank, Apple's GPU, or the CPU.

    Raises:
        UsageError: if there is no such device.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = one_line(error)
        raise UsageError(f"the device {str(device)!r} cannot be used ({reason}); {_choices()}") from None
    return chosen


def _choices() -> str:
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return f"leave it out or write {' or '.join(['cpu', *(name for name, there in gpus.items() if there)])}"


def pick_precision(precision: str, device: torch.device) -> str:
    """`precision`, or for "auto" bf16 where the hardware computes in it, else fp16 on a CUDA GPU and fp32 elsewhere.

    A CPU without AVX512_BF16, AMX or Arm's bf16 emulates it, many times slower than fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def settle_precision(config: Config, out: Path) -> Config:
    """`config` with the precision that "auto" stands for: what a run begun in `out` uses, else the machine's best."""
    settings: Any = config
    if settings.precision != "auto":
        return config
    begun = read_json(out / RUN).get("config", {}).get("precision") if (out / RUN).exists() else None
    return dataclasses.replace(settings, precision=begun or pick_precision("auto", pick_device()))  # type: ignore[no-any-return]


def is_emulated(model: Any, device: torch.device) -> bool:
    """Whether a CPU would emulate the half precision of some of a model's weights, many times slower than float32."""
    fast = {torch.float32, torch.float64, *([torch.bfloat16] if cpu_has_bf16() else [])}
    return device.type == "cpu" and not {weight.dtype for weight in _saved(model)} <= fast


def _saved(model: Any) -> list[torch.Tensor]:
    """The numbers of a model that its files hold: not what is computed when it is made, as position frequencies are."""
    return [tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()]


def cast(model: Any, device: torch.device, dtype: torch.dtype | str | None = None) -> Any:
    """`model` on `device`, its weights in `dtype`.

    Args:
        dtype: "auto" leaves the weights as they were saved; None too, but makes them float32 where a CPU would emulate
            their half precision, many times slower.

    >>> half = torch.nn.Linear(2, 2, dtype=torch.float16)
    >>> cast(half, torch.device("cpu"), "auto").weight.dtype, cast(half, torch.device("cpu")).weight.dtype
    (torch.float16, torch.float32)
    """
    model = model.to(device)
    if dtype is None:
        dtype = torch.float32 if is_emulated(model, device) else "auto"
    if dtype == "auto":
        return model
    for tensor in _saved(model):
        tensor.data = tensor.data.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model
