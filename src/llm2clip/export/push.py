"""push: an exported folder or a teacher onto the Hub, with a card that says how to use it and whose licences apply."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm2clip.artifacts import MANIFEST, RUN, check_finished, indented_json, made_as, read_json
from llm2clip.errors import LLM2CLIPError, UsageError, one_line, setting
from llm2clip.export.card import is_place, members_of, origin
from llm2clip.export.config import PushConfig

logger = logging.getLogger("llm2clip")
README = "README.md"
TEACHER = Path(__file__).with_name("teacher_card.md")
NOT_STATED, UNNAMED = "not stated; see its page", "a model that is not on the Hub"
LLMS = ("the LLM", "a member of the teacher")
PATIENT = 30.0
"""Seconds for the Hub to say whether a model is there: a wrong answer would be on the card."""
FACTS = frozenset(
    "format format_version llm2clip_version fingerprint teacher_fingerprint files prompt to dim teacher_dim tower_dim "
    "tower_type tower_class pooling load_options image_size kinds steps num_samples batch_size checked probed_on "
    "before after captions_cut merge_error".split()
)
"""What of a manifest says nothing of this machine: what opening the folder takes, and the card says."""
SETTINGS = "attention tuning epochs batch_size learning_rate pooling max_length chat_template weights".split()
"""The same of its settings; all others stay here, as many are paths, or hold some."""


def push(config: PushConfig) -> str:
    """Put the folder that `config` names onto the Hub as one commit; returns its address there.

    What its manifest says of this machine stays here, as `run.json` does; files of an earlier push are taken out.

    Raises:
        UsageError: for a folder that is no export and no teacher, a Hub that does not take it, or a public place there
            for what is to be private.
        LLM2CLIPError: if afterwards files are not there.

    Example:
        >>> push(PushConfig(folder="bundle", name="me/my-bundle"))                       # doctest: +SKIP
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder, manifest = config.folder, open_folder(config.folder)
    api = HfApi()
    with hub_errors(config.name):
        licences = licences_on_hub(without_commit(name) for _, name in parts_of(manifest))
        written: dict[str, bytes | Path] = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if belongs(path, folder)
        }
        written[README] = card_of(folder, manifest, licences, config.name).encode()
        written[MANIFEST] = indented_json(published(manifest, licences))
        url = str(api.create_repo(config.name, private=config.private, exist_ok=True))
        if config.private and not api.repo_info(config.name).private:  # of one that is there nothing was changed
            raise UsageError(
                f"{config.name} is on the Hub and public, so {setting('private')} cannot hold; make it private in its "
                "settings there, or give another name"
            )
        earlier = set(api.list_repo_files(config.name)) - set(written) - {".gitattributes"}
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in sorted(earlier)]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in written.items()]
        api.create_commit(config.name, operations, commit_message=f"llm2clip {made_as(manifest)}")
        there = set(api.list_repo_files(config.name))
    if missing := sorted(set(written) - there):
        raise LLM2CLIPError(f"{config.name} lacks {missing[0]} ({len(missing)} in all); type the same command again")
    logger.info("%s: %d files, at %s", config.name, len(written), url)
    return url


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what the Hub's library raises into a UsageError of one line; our own errors stay what they are."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, LLM2CLIPError):
            raise
        raise UsageError(
            f"{name} cannot be written on the Hub ({one_line(error)}); see that you may write there, and that this "
            "machine is known: hf auth login"
        ) from None


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
    """Whether a file of the folder is part of the model.

    What a run leaves for itself, or is hidden, is not; nor an adapter beside it, in which peft wrote its base's place.
    """
    inside = path.relative_to(folder)
    left_out = inside.as_posix() == RUN or inside.parts[0] == "adapter"
    return path.is_file() and not left_out and not any(part.startswith(".") for part in inside.parts)


def parts_of(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The models that a folder was made of, what each is and its name, as far as its manifest tells."""
    config, llm = manifest.get("config", {}), manifest.get("llm")
    if made_as(manifest) == "teacher":
        llm = members_of(config) or llm  # the last if it was pushed before
    llms = llm.split(", ") if isinstance(llm, str) else llm or []
    found = [("the LLM" if len(llms) == 1 else "a member of the teacher", name) for name in llms]
    named = {"the teacher": "teacher", "the student": "source", "the vision tower": "tower"}
    return found + [(what, manifest[key]) for what, key in named.items() if isinstance(manifest.get(key), str)]


def licences_on_hub(names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that are models on the Hub, each with its licence.

    A manifest does not tell "org/tower" from the folder "runs/tower" of another machine, so the Hub is asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    found = {}
    for name in names:
        if name.count("/") != 1 or is_place(name):
            continue
        try:
            data = HfApi().model_info(name, timeout=PATIENT).card_data
        except (HFValidationError, HfHubHTTPError) as error:
            if getattr(getattr(error, "response", None), "status_code", 0) >= 500:  # no answer to what was asked
                raise
            continue
        found[name] = str((data and data.license) or NOT_STATED)
    return found


def published(manifest: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """What of a manifest goes onto the Hub: the facts in `FACTS` and `SETTINGS`, and the names of models in `known`.

    >>> published({"dim": 8, "tower": "runs/tower", "config": {"data": ["/home/me"], "seed": 1}}, known=())
    {'dim': 8, 'config': {}}
    """
    found = {key: value for key, value in manifest.items() if key in FACTS}
    for key in ("teacher", "source", "tower"):
        if without_commit(manifest.get(key)) in known:
            found[key] = manifest[key]
    if "tower" in found and manifest.get("tower_revision"):
        found["tower_revision"] = manifest["tower_revision"]
    if llms := [name for what, name in parts_of(manifest) if what in LLMS and name in known]:
        found["llm"] = llms
    if members := manifest.get("members"):
        found["members"] = [
            {key: value for key, value in member.items() if key != "name" or value in known} for member in members
        ]
    settings = manifest.get("config", {})
    return {**found, "config": {key: settings[key] for key in SETTINGS if key in settings}}


def without_commit(name: Any) -> str:
    """A model's name without the commit that `source` has behind it."""
    return str(name).split("@")[0]


def card_of(folder: Path, manifest: Mapping[str, Any], licences: Mapping[str, str], name: str) -> str:
    """The model card: that of the export, or a teacher's, with the name on the Hub in its code, and all licences.

    Args:
        manifest: the folder's own.
        licences: of the models on the Hub among its parts; others are not named.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Template

    card: Any
    facts = published(manifest, licences)
    if made_as(manifest) == "teacher":
        llms = ", ".join(f"`{llm}`" for llm in facts.get("llm", ())) or UNNAMED
        card = ModelCard(Template(TEACHER.read_text(encoding="utf-8")).render({**facts, "llm": llms}))
    else:
        card = ModelCard.load(folder / README)
        card.text = with_origin(card.text, facts)
    rows = []
    for what, given in parts_of(manifest):
        part = without_commit(given)
        which, licence = (f"`{part}`", licences[part]) if part in licences else (UNNAMED, licence_here(given))
        rows.append(f"| {what} | {which} | {licence} |")
    rows.append("| the images and captions | | those of their sources |")
    table = ["## Licences", "", "All of these apply.", "", "| part | which | licence |", "|---|---|---|", *rows]
    card.data.license, card.data.license_name = "other", "those-of-its-parts"
    if licences:
        card.data.base_model = list(licences)
    fetched = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{name}")'
    text = card.text.replace('folder = "."', fetched)  # for what opens files, and no names
    text = (
        text.replace("local-dir:.", f"hf-hub:{name}")
        .replace('"."', f'"{name}"')
        .replace("  # this folder", "")
        .replace("THIS_FOLDER", f'"{name}"')
    )
    card.text = "\n".join([text.rstrip(), "", *table, ""])
    return str(card)


def with_origin(text: str, facts: Mapping[str, Any]) -> str:
    """A card's text in which the models it was made from are named as `facts` do, and not at all where they do not."""
    rows = origin(dict(facts))
    for what in ("student", "LLM of the teacher", "tower"):
        row = f"| {what} | `{rows[what]}` |\n" if what in rows else ""
        text = re.sub(rf"^\| {what} \| `.*` \|\n", row.replace("\\", r"\\"), text, flags=re.MULTILINE)
    return text


def licence_here(name: str) -> str:
    """What the card of a model in a folder says of its licence."""
    from huggingface_hub import ModelCard

    here = Path(name) / README
    try:
        return str((here.is_file() and ModelCard.load(here).data.license) or "not stated")
    except (OSError, ValueError):  # a card is written without it too
        return "not stated"
