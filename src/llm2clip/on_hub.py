"""Names on the Hub: whether there is such a model or dataset, asked once and briefly, and a model's folder here.

The Hub's own library tries again for half a minute where nothing answers; whoever mistyped a name, or sits in a train,
should not have to wait for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm2clip.artifacts import check_name
from llm2clip.errors import UsageError, one_line

SECONDS = 2.5
"""How long the Hub has to answer."""
NOT_READ = ("*.gguf", "*.onnx", "original/*")
"""Other formats of the weights that a model's repository may hold, as large again."""


def check_model(name: str, *, revision: str | None = None, what: str = "") -> None:
    """Raise if a model is neither a folder, nor in the Hub's cache on this machine, nor on the Hub.

    Args:
        revision: branch, tag or commit of a Hub id.
        what: the setting that has it, for the message.

    Raises:
        UsageError: with what to do.
    """
    check_name(name, what=what)
    if Path(name).is_dir() or _cached(name, revision) is not None:
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

    if why := unreachable(name, revision=revision):
        if (cached := _cached(name, revision)) is None:
            raise UsageError(f"{name} is no folder here, and {why}")
        return cached
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(NOT_READ)))
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} cannot be fetched from the Hub: {one_line(error)}") from None


def unreachable(name: str, *, revision: str | None = None, kind: str = "model", given: str = "") -> str:
    """Why the Hub cannot be asked for a model or dataset, for a message; empty if it has it.

    Args:
        given: what messages call it.

    Raises:
        UsageError: if it has none of that name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    here = f"{given or name} is no folder here, and" if kind == "model" else f"{given or name}:"
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)
    except RevisionNotFoundError:
        raise UsageError(f"{here} the Hub has no revision {revision!r} of it; look at its branches and tags") from None
    except ValueError as error:  # no name at all
        raise UsageError(f"{here} no Hub id that can be: {one_line(error)}") from None
    except Exception as error:  # noqa: BLE001  (that of the HTTP library in use, which has changed more than once)
        if isinstance(error, RepositoryNotFoundError) or _status(error) == 404:
            advice = "look at its spelling; a private or gated one needs: hf auth login"
            raise UsageError(f"{here} the Hub has no {kind} of that name that you may read; {advice}") from None
        return f"the Hub cannot be reached ({one_line(error)}); give what lies here, or go where there is a network"
    return ""


def _status(error: Exception) -> int:
    """The HTTP status that an error is about, 0 if none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a Hub id on this machine, as far as it was downloaded."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
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
