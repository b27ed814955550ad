"""Where the images are that a table names and that are not there: which folder its paths are relative to."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llm2clip.errors import setting

MOST_ENTRIES, MOST_SECONDS = 20_000, 2.0
"""How many files and folders are looked at, and for how long: a line to read, and no search of a disk."""
MOST_NAMES = 20
"""Missing images that are looked for."""


@dataclass(frozen=True)
class Missing:
    """Images that a table names and that are not there.

    Attributes:
        table: its path.
        names: as it has them.
        looked: how many of its images were looked for.
        example: the path at which the first should be.
    """

    table: str
    names: tuple[str, ...]
    looked: int
    example: str

    def __str__(self) -> str:
        """What is missing, and where it lies."""
        first = f"of the first {self.looked} images that it names"
        what = f"none {first} is there" if self.all else f"{len(self.names)} {first} are not there"
        return f"{self.table}: {what}, such as {self.example}; {self.hint()}"

    @property
    def all(self) -> bool:
        """Whether not one of those looked for is there."""
        return len(self.names) == self.looked

    def hint(self) -> str:
        """Where files of these names lie, and what to type for them to be found."""
        folder = os.path.dirname(self.table)
        places = [folder, os.getcwd(), os.path.dirname(folder)]
        root, other = find_root(self.names, places)
        if root:
            return f"there are such files in {root}: give {setting('image_root', shown_path(root))}"
        if other:
            return f"there is {shown_path(other)}, but no folder from which the table's paths would lead to such files"
        below = " and ".join(dict.fromkeys(places[:2]))
        return f"no file of that name was found below {below}; give their folder: {setting('image_root', 'DIR')}"


def find_root(names: Sequence[str], places: Sequence[str]) -> tuple[str, str]:
    """The folder below one of `places` that most of `names` are paths from, and a file that is called like one.

    Either is empty if there is none; absolute names are paths from no folder.
    """
    wanted = {os.path.basename(name): os.path.normpath(name) for name in names[:MOST_NAMES]}
    called = ""
    for path in _files(places):
        if (name := wanted.get(os.path.basename(path))) is None:
            continue
        called = called or path
        if not os.path.isabs(name) and path.endswith(os.sep + name):
            root = path[: -len(name) - 1] or os.sep
            found = sum(os.path.isfile(os.path.join(root, name)) for name in wanted.values())
            if 2 * found > len(wanted):
                return root, called
    return "", called


def _files(places: Sequence[str]) -> Iterator[str]:
    """Files below some folders, the nearer ones first, hidden ones and links left out, as far as the bounds go."""
    end, number = time.monotonic() + MOST_SECONDS, 0
    waiting = deque(dict.fromkeys(places))
    seen: set[str] = set()
    while waiting:
        folder = waiting.popleft()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    number += 1
                    if number > MOST_ENTRIES or time.monotonic() > end:
                        return
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        yield entry.path
        except OSError:  # not ours to read
            continue


def shown_path(path: str) -> str:
    """A path as one types it: from the current folder if it lies in it."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative
