"""push: an exported folder or a teacher onto the Hub, with a card that says how to use it and whose licences apply."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip.artifacts import MANIFEST, RUN, check_finished, indented_json, made_as, read_json
from llm2clip.errors import LLM2CLIPError, UsageError, one_line
from llm2clip.export.card import is_place, shown_name
from llm2clip.export.config import PushConfig
from llm2clip.on_hub import SECONDS

logger = logging.getLogger("llm2clip")
README = "README.md"
TEACHER = Path(__file__).with_name("teacher_card.md")
NOT_STATED = "not stated; see its page"


def push(config: PushConfig) -> str:
    """Put the folder that `config` names onto the Hub as one commit; returns its address there.

    Local paths in its manifest become the names of their last folders, and `run.json` stays here.

    Raises:
        UsageError: for a folder that is no export and no teacher, or a Hub that does not take it.
        LLM2CLIPError: if afterwards files are not there.

    Example:
        >>> push(PushConfig(folder="bundle", name="me/my-bundle"))                       # doctest: +SKIP
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder, manifest = config.folder, open_folder(config.folder)
    written: dict[str, bytes | Path] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if belongs(path, folder)
    }
    written[README] = card_of(folder, manifest, config.name).encode()
    written[MANIFEST] = indented_json(without_places(manifest))
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in written.items()
    ]
    api = HfApi()
    try:
        url = str(api.create_repo(config.name, private=config.private, exist_ok=True))
        api.create_commit(config.name, operations, commit_message=f"llm2clip {made_as(manifest)}")
        there = set(api.list_repo_files(config.name))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{config.name} cannot be written on the Hub ({one_line(error)}); see that you may write there, and "
            "that this machine is known: hf auth login"
        ) from None
    if missing := sorted(set(written) - there):
        raise LLM2CLIPError(f"{config.name} lacks {missing[0]} ({len(missing)} in all); type the same command again")
    logger.info("%s: %d files, at %s", config.name, len(written), url)
    return url


def open_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a finished export or teacher.

    Raises:
        UsageError: if it is something else.
        ArtifactError: if it is not finished.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give one that export, train-teacher or join-teachers made")
    check_finished(folder, folder)
    manifest: dict[str, Any] = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    made = made_as(manifest)
    if made not in ("export", "teacher"):
        advice = "write it by llm2clip export first" if made == "student" else "give an export or a teacher"
        raise UsageError(f"{folder} is no export and no teacher (found: {made or 'no manifest'}); {advice}")
    return manifest


def belongs(path: Path, folder: Path) -> bool:
    """Whether a file of the folder is part of the model: what a run leaves for itself, or is hidden, is not."""
    inside = path.relative_to(folder)
    return path.is_file() and inside.as_posix() != RUN and not any(part.startswith(".") for part in inside.parts)


def without_places(value: Any) -> Any:
    """A manifest in which paths of this machine are the names of what lies there.

    >>> without_places({"config": {"model": "/home/me/student", "teacher": "org/llm"}})
    {'config': {'model': 'student', 'teacher': 'org/llm'}}
    """
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_place(value) else value


def card_of(folder: Path, manifest: Mapping[str, Any], name: str) -> str:
    """The model card: that of the export, or a teacher's, with the name on the Hub in its code, and all licences."""
    from huggingface_hub import ModelCard
    from jinja2 import Template

    card: Any
    if made_as(manifest) == "teacher":
        words = {**manifest, "llm": shown_name(manifest["config"].get("model") or manifest["config"].get("teachers"))}
        card = ModelCard(Template(TEACHER.read_text(encoding="utf-8")).render(words))
    else:
        card = ModelCard.load(folder / README)
    parts = parts_of(manifest)
    rows = [f"| {what} | `{shown_name(part)}` | {licence_of(part)} |" for what, part in parts.items()]
    rows.append("| the images and captions | | those of their sources |")
    licences = "\n".join(
        ["## Licences", "", "All of these apply.", "", "| part | which | licence |", "|---|---|---|", *rows]
    )
    card.data.license, card.data.license_name = "other", "those-of-its-parts"
    if bases := [part for part in parts.values() if part.count("/") == 1 and not is_place(part)]:
        card.data.base_model = bases
    fetched = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{name}")'
    text = card.text.replace('folder = "."', fetched)  # for what opens files, and no names
    text = (
        text.replace("local-dir:.", f"hf-hub:{name}")
        .replace('"."', f'"{name}"')
        .replace("  # this folder", "")
        .replace("THIS_FOLDER", f'"{name}"')
    )
    card.text = f"{text.rstrip()}\n\n{licences}\n"
    return str(card)


def parts_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The models that a folder was made of, by what they are, as far as its manifest tells."""
    config = manifest.get("config", {})
    found = {"the LLM": manifest.get("llm") or (config.get("model") if made_as(manifest) == "teacher" else None)}
    found |= {"the teacher": manifest.get("teacher"), "the student": manifest.get("source")}
    found["the vision tower"] = manifest.get("tower")
    return {what: str(name).split("@")[0] for what, name in found.items() if name}


def licence_of(name: str) -> str:
    """What the card of a model on the Hub, or in a folder, says of its licence."""
    from huggingface_hub import ModelCard

    here = Path(name) / README
    try:
        if here.is_file():
            return str(ModelCard.load(here).data.license or NOT_STATED)
        from huggingface_hub import HfApi

        data = None if is_place(name) else HfApi().model_info(name, timeout=SECONDS).card_data
        return str((data and data.license) or NOT_STATED)
    except Exception:  # noqa: BLE001  (of the HTTP library in use; a card is written without it too)
        return NOT_STATED
