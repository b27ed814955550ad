"""Fetching the files of benchmarks whose licence and whose plain addresses allow it, when asked to."""

from __future__ import annotations

import logging
import shutil
import tarfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.eval.card import Card
from llm2clip.progress import Progress, human_bytes

logger = logging.getLogger("llm2clip")
PIECE = 1 << 20
SECONDS = 60
"""After which a server that sends nothing is given up."""


def download(name: str, card: Card, root: Path) -> None:
    """Put the files of a benchmark into its folder below `root`; what is there is kept, what was begun goes on.

    Tars are unpacked to `images/`, each image under its own name, and deleted.

    Raises:
        UsageError: if the card names no address that may be used so, or the disk has no room.
        SourceError: if a server does not give a file.
    """
    if not card.downloads:
        raise UsageError(
            f"{setting('download')}: {name} must be fetched by hand ({card.licence}): {'; '.join(card.fetch)}"
        )
    folder = root / (card.variant_of or name)
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("%s: %s", name, card.licence)
    for address in card.downloads:
        packed = address.endswith((".tgz", ".tar.gz"))
        path = folder / PurePosixPath(address).name
        if not (folder / "images" if packed else path).exists():
            if not path.exists():
                _fetch(address, path)
            if packed:
                _unpack(path, folder / "images")


def _fetch(address: str, path: Path) -> None:
    """Write what lies at an address to a file, from where an earlier try ended."""
    part = path.with_name(f"{path.name}.part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            if answer.status != 206:  # the whole file, whatever was asked for
                done = 0
            left = int(answer.headers.get("Content-Length") or 0)
            if left > (free := shutil.disk_usage(path.parent).free):
                raise UsageError(f"{address} takes {human_bytes(left)}, {path.parent} has {human_bytes(free)} free")
            with (
                part.open("ab" if done else "wb") as file,
                Progress(done + left, description=path.name, unit="bytes", initial=done) as progress,
            ):
                while piece := answer.read(PIECE):
                    file.write(piece)
                    progress.advance(len(piece))
                    left -= len(piece)
        if left > 0:
            raise SourceError(f"{address} ended {left:,} bytes early; the same command goes on")
    except urllib.error.HTTPError as error:
        raise SourceError(f"{address}: the server says {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:  # urllib.error.URLError among them
        raise SourceError(f"{address}: {getattr(error, 'reason', error)}; the same command goes on") from None
    part.rename(path)


def _unpack(archive: Path, folder: Path) -> None:
    """The files of a tar in one folder, which is there when all are."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name, content = PurePosixPath(member.name).name, tar.extractfile(member) if member.isfile() else None
                if content is not None and not name.startswith("."):
                    with (part / name).open("xb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, FileExistsError) as error:
        raise SourceError(f"{archive} cannot be unpacked ({error}); delete it and fetch it again") from None
    part.rename(folder)
    archive.unlink()
