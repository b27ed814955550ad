"""A picture's path as a table gives it -> where it lies, kept inside the table's own folder."""

from __future__ import annotations

import functools
import os
import posixpath

from llm2clip.captions.reading import is_url
from llm2clip.captions.sample import PictureRef
from llm2clip.errors import UsageError


class Places:
    """Resolves picture paths of one table.

    Args:
        table: absolute path or URL of the table; relative pictures lie beside it.
        allow_outside: whether pictures may lie outside the table's folder.

    Example:
        >>> Places("/data/captions.csv", allow_outside=False).resolve("a/1.jpg").path
        '/data/a/1.jpg'
    """

    def __init__(self, table: str, *, allow_outside: bool) -> None:
        self.table, self.allow_outside = table, allow_outside
        self.folder = posixpath.dirname(table)
        if not is_url(table):
            # the Hub cache keeps files as links to blobs: beside the table's target lie its pictures' targets
            self._roots = {os.path.realpath(self.folder), os.path.dirname(os.path.realpath(table))}
            self._real_folder = functools.lru_cache(maxsize=4096)(os.path.realpath)

    def resolve(self, name: str) -> PictureRef:
        """Where the picture called `name` in the table lies.

        Raises:
            UsageError: if that is outside the table's folder, by name or through a link.
        """
        inside = self._inside_url if is_url(self.folder) else self._inside_folder
        path = self._join(name)
        if not self.allow_outside and not inside(path):
            raise UsageError(
                f"{self.table}: picture {name!r} lies outside the table's folder; move it or add --allow-outside"
            )
        return PictureRef(path)

    def _join(self, name: str) -> str:
        if is_url(name):
            return name
        if is_url(self.folder):
            scheme, _, rest = self.folder.rpartition("://")
            return f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"
        return os.path.normpath(os.path.join(self.folder, name))

    def _inside_url(self, path: str) -> bool:
        return path.startswith(self.folder + "/") and "/../" not in path

    def _inside_folder(self, path: str) -> bool:
        if is_url(path):
            return False
        if "\0" in path:  # no file has such a name: it will be reported as missing
            return True
        real = os.path.realpath(path) if os.path.islink(path) else self._real_folder(os.path.dirname(path)) + "/"
        return any(real.startswith(root.rstrip("/") + "/") for root in self._roots)
