"""What `--data` names as datasets: each source by itself with a name for the report; tars of one folder together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

MAGIC = re.compile(r"[*?\[\]{}]")


def named_datasets(specs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sources of each dataset by its name; equal names are numbered.

    >>> named_datasets(["coco/test.csv", "docci/test.csv", "s/00000.tar", "s/00001.tar", "hf:org/urban:test"])
    {'test': ('coco/test.csv',), 'test-2': ('docci/test.csv',), 's': ('s/00000.tar', 's/00001.tar'), \
'urban-test': ('hf:org/urban:test',)}
    """
    groups: list[tuple[str, list[str]]] = []
    for spec in specs:
        if groups and _tar_folder(spec) and _tar_folder(spec) == _tar_folder(groups[-1][1][0]):
            groups[-1][1].append(spec)
        else:
            groups.append((dataset_name(spec), [spec]))
    named: dict[str, tuple[str, ...]] = {}
    for name, members in groups:
        if len(members) > 1:
            name = PurePosixPath(_tar_folder(members[0]) or name).name
        count, unique = 1, name
        while unique in named:
            count += 1
            unique = f"{name}-{count}"
        named[unique] = tuple(members)
    return named


def dataset_name(spec: str) -> str:
    """What a source is called in a report: its file's or folder's name without ending; of a pattern, the folder's.

    >>> dataset_name("shards/{00000..00012}.tar"), dataset_name("/data/flickr30k.csv"), dataset_name("images/")
    ('shards', 'flickr30k', 'images')
    """
    if spec.startswith("hf:") and "://" not in spec:
        return "-".join(spec.removeprefix("hf:").rpartition("/")[2].split(":"))
    path = PurePosixPath(re.split(r"[?#]", spec)[0] if "://" in spec else spec)
    plain = [part for part in path.parts if not MAGIC.search(part)]
    if len(plain) < len(path.parts):
        return plain[-1].strip("/:") or "data" if plain else "data"
    return path.stem or "data"


def _tar_folder(spec: str) -> str | None:
    """The folder of a tar, or None for other sources."""
    return str(PurePosixPath(spec).parent) if spec.lower().endswith(".tar") else None
