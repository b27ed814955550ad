"""Hugging Face datasets, `hf:org/name[/config][:split]`: fetched once by `datasets`, then local Arrow files."""

from __future__ import annotations

import re
from typing import Any

from llm2clip.captions.bad import logger
from llm2clip.captions.parts import Reading
from llm2clip.captions.reading import url_errors
from llm2clip.captions.specs import File, find_files
from llm2clip.captions.tables import TablePart
from llm2clip.errors import SourceError, UsageError

FORM = re.compile(r"hf:(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")


def is_hub_id(spec: str) -> bool:
    """Whether a source is a Hub id; `hf://...` is a URL of files.

    >>> is_hub_id("hf:org/name:test"), is_hub_id("hf://datasets/org/name/*.tar")
    (True, False)
    """
    return spec.startswith("hf:") and not spec.startswith("hf://")


def hub_parts(spec: str, reading: Reading, *, revision: str | None) -> list[TablePart]:
    """The Arrow files of a Hub dataset's split: the one named, the only one, or "train".

    Raises:
        UsageError: if the id, config or split does not exist.
        SourceError: if it cannot be fetched or prepared.
    """
    form = FORM.fullmatch(spec)
    if form is None:
        raise UsageError(f"--data {spec} is no Hub dataset; write hf:org/name or hf:org/name:split")
    dataset = _load(spec, form["id"], form["config"], revision)
    split = form["split"] or _only_split(spec, list(dataset))
    if split not in dataset:
        raise UsageError(f"--data {spec} has no split {split!r}; it has {', '.join(dataset)}")
    files = [find_files(cached["filename"])[0] for cached in dataset[split].cache_files]
    label = f"{form['id']}{'/' + form['config'] if form['config'] else ''}:{split}"
    return [TablePart(File(f.path, f.size), reading, name=f"{label}/{i:05d}") for i, f in enumerate(files)]


def _load(spec: str, name: str, config: str | None, revision: str | None) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        return load_dataset(name, config, revision=revision)
    except DatasetNotFoundError as error:
        raise UsageError(f"--data {spec} is not on the Hub, or you have no access: {_first_line(error)}") from None
    except (DatasetsError, RuntimeError, *url_errors()) as error:
        raise SourceError(f"--data {spec} cannot be loaded: {_first_line(error)}") from None


def _only_split(spec: str, splits: list[str]) -> str:
    if len(splits) > 1:
        if "train" not in splits:
            raise UsageError(f"--data {spec} has the splits {', '.join(splits)}; name one, as {spec}:{splits[0]}")
        logger.info("%s: taking the split train of %s", spec, ", ".join(splits))
    return "train" if "train" in splits else splits[0]


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
