"""Names on the Hub: whether there is such a model or dataset, asked once and briefly, and a model's folder here.

The Hub's own library tries again for half a minute where nothing answers; whoever mistyped a name, or sits in a train,
should not have to wait for that.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.artifacts import check_name, read_json
from llm2clip.errors import UsageError, one_line
from llm2clip.released import is_released, weight_files

SECONDS = 2.5
"""How long the Hub has to answer."""
OTHERS = re.compile(r"(original|onnx|openvino|coreml|gguf|runs|checkpoint-\d+)/")
"""Folders of a model's repository with what other programs read."""
WEIGHTS = ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .ot .gguf .onnx .onnx_data .tflite .npz".split()
"""Endings of weights; a repository may hold the same ones in several formats, each as large as the others."""
READ = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors")
"""The weights that transformers and peft read, where there are others beside them (of half the precision, say)."""
PICKLED = re.compile(r"pytorch_model.*\.bin|adapter_model\.bin")
MODULE_FOLDER = re.compile(r"(.+_)?\d+_\w+")
"""What sentence-transformers calls the folder of a module ("1_Pooling"), or of one in a Router ("query_0_Dense")."""


def check_model(name: str, *, revision: str | None = None, what: str = "") -> None:
    """Raise if a model is neither a folder, nor in the Hub's cache on this machine, nor on the Hub.

    Args:
        revision: branch, tag or commit of a Hub id.
        what: the setting that has it, for the message.

    Raises:
        UsageError: with what to do.
    """
    check_name(name, what=what)
    if Path(name).is_dir() or cached_folder(name, revision) is not None:
        return
    given = f"{what} {name}".lstrip()
    if why := unreachable(name, revision=revision, given=given):
        raise UsageError(f"{given} is no folder here, and {why}")


def model_folder(name: str, *, revision: str | None = None) -> Path:
    """The folder of a model on this machine: `name` if it is one, else its snapshot, downloaded if it is not there.

    Raises:
        UsageError: if there is none, with what to do.
    """
    check_name(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    files, why = _look_up(name, revision=revision)
    if why:
        if (cached := cached_folder(name, revision)) is None:
            raise UsageError(f"{name} is no folder here, and {why}")
        return cached
    try:
        config = _config(name, revision) if "config.json" in files else {}
        wanted = files_to_read(files, config)
        if not is_released(config, files):
            check_no_pickle(files, name)
        return Path(snapshot_download(name, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]))
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} cannot be fetched from the Hub: {one_line(error)}") from None


def _config(name: str, revision: str | None) -> Mapping[str, Any]:
    """The `config.json` of a Hub id, which says what its other files are."""
    from huggingface_hub import hf_hub_download

    return read_json(Path(hf_hub_download(name, "config.json", revision=revision)))  # type: ignore[no-any-return]


def files_to_read(files: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Of a model's files those that are read: its weights in one format, and what is no weight.

    >>> files_to_read(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"], {})
    ['config.json', 'model.safetensors']
    """
    files = [file for file in files if not OTHERS.match(file)]
    plain = [file for file in files if Path(file).suffix not in WEIGHTS]
    if is_released(config, files):
        return plain + weight_files(config, files)
    weights = []
    for folder in sorted({str(Path(file).parent) for file in files}):
        own = [file for file in files if str(Path(file).parent) == folder and file.endswith(".safetensors")]
        weights += [file for file in own if READ.fullmatch(Path(file).name)] or own
    return plain + weights


def check_no_pickle(files: Sequence[str], name: str) -> None:
    """Raise if the weights of a model, or of one of its modules, lie in a pickle: reading one can run any code.

    Args:
        files: relative to the model's folder; what lies in folders that are no module's is not looked at.

    Raises:
        UsageError: naming the pickle.
    """
    for file in sorted(files):
        folder = Path(file).parent
        is_part = all(MODULE_FOLDER.fullmatch(part) for part in folder.parts)
        beside = [each for each in files if Path(each).parent == folder and each.endswith(".safetensors")]
        if is_part and PICKLED.fullmatch(Path(file).name) and not beside:
            raise UsageError(
                f"{name} keeps its weights in a pickle ({file}), which is never loaded; give a model with safetensors, "
                "or have save_pretrained write this one again where you trust it"
            )


def files_of(name: str, *, revision: str | None = None) -> list[str]:
    """The files of a model's folder, or of a Hub id; where the Hub cannot be asked, those that were fetched before."""
    here = Path(name) if Path(name).is_dir() else None
    files, why = ([], "") if here else _look_up(name, revision=revision)
    if here or why:
        folder = here or cached_folder(name, revision)
        files = [path.name for path in folder.iterdir()] if folder else []
    return files


def is_pickled(files: Sequence[str]) -> bool:
    """Whether weights are there as `pytorch_model.bin` alone.

    >>> is_pickled(["open_clip_model.safetensors", "pytorch_model.bin"])  # the first is another library's
    True
    >>> is_pickled(["model.safetensors", "pytorch_model.bin"])
    False
    """
    return any(PICKLED.fullmatch(file) for file in files) and not any(READ.fullmatch(file) for file in files)


def unreachable(name: str, *, revision: str | None = None, kind: str = "model", given: str = "") -> str:
    """Why the Hub cannot be asked for a model or dataset, for a message; empty if it has it.

    Args:
        given: what messages call it.

    Raises:
        UsageError: if it has none of that name.
    """
    return _look_up(name, revision=revision, kind=kind, given=given)[1]


def _look_up(name: str, *, revision: str | None = None, kind: str = "model", given: str = "") -> tuple[list[str], str]:
    """The files of a model or dataset on the Hub; or none, and why it cannot be asked. See `unreachable`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    here = f"{given or name} is no folder here, and" if kind == "model" else f"{given or name}:"
    try:
        found = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)
    except RevisionNotFoundError:
        raise UsageError(f"{here} the Hub has no revision {revision!r} of it; look at its branches and tags") from None
    except ValueError as error:  # no name at all
        raise UsageError(f"{here} no Hub id that can be: {one_line(error)}") from None
    except Exception as error:  # noqa: BLE001  (that of the HTTP library in use, which has changed more than once)
        if isinstance(error, RepositoryNotFoundError) or _status(error) == 404:
            advice = "look at its spelling; a private or gated one needs: hf auth login"
            raise UsageError(f"{here} the Hub has no {kind} of that name that you may read; {advice}") from None
        return [], f"the Hub cannot be reached ({one_line(error)}); give what lies here, or go where there is a network"
    return [file.rfilename for file in getattr(found, "siblings", None) or []], ""


def _status(error: Exception) -> int:
    """The HTTP status that an error is about, 0 if none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot of a Hub id on this machine, as far as it was downloaded."""
    from huggingface_hub import snapshot_download

    try:
        # of which files there must be only the first is asked for: what is not read was not downloaded
        options: dict[str, Any] = {"local_files_only": True, "allow_patterns": ["config.json"]}
        return Path(snapshot_download(name, revision=revision, **options))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """While this runs, `datasets` looks into its cache alone, and does not try for half a minute to reach the Hub."""
    import datasets
    from huggingface_hub import constants

    places: list[Any] = [datasets.config, constants]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
