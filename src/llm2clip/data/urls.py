"""What is behind a URL: the file system that fsspec has for it, and what that raises."""

from __future__ import annotations

import contextlib
import functools
import os
import pkgutil
import re
from typing import Any

from llm2clip.errors import SourceError


def is_url(path: str) -> bool:
    """Whether `path` is for fsspec (`https://...`, `hf://...`, `simplecache::s3://...`), not a local file.

    >>> is_url("hf://datasets/org/name/00000.tar"), is_url("/data/00000.tar")
    (True, False)
    """
    return "://" in path


def suffix(path: str) -> str:
    """The file name's ending, lower case; a URL's query is not part of it.

    >>> suffix("https://host/A.TAR?download=1")
    '.tar'
    """
    return os.path.splitext(re.split(r"[?#]", path)[0] if is_url(path) else path)[1].lower()


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system for a URL, and the path in it; SourceError if a package for it is not installed."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SourceError(f"{url} needs another package ({error}); type: pip install 'llm2clip[remote]'") from None
    return filesystem, str(path)


@functools.lru_cache
def url_errors() -> tuple[type[Exception], ...]:
    """What a file behind a URL raises: the usual ones, and those of the HTTP, Hub and S3 clients that are installed."""
    errors: set[type] = {OSError, ValueError}
    for name in ("aiohttp:ClientError", "huggingface_hub.errors:HfHubHTTPError", "botocore.exceptions:BotoCoreError"):
        with contextlib.suppress(ImportError):
            error = pkgutil.resolve_name(name)
            # a Hub error's bases are those of its HTTP client's errors, httpx or another as versions go
            errors |= {base for base in error.__mro__ if issubclass(base, Exception) and base is not Exception}
    return tuple(errors)
