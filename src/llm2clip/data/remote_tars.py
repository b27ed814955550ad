"""Tars behind URLs: each read once from front to end, and an index of what went by kept on this machine.

The next stage, or the same command after a stop, reads the index instead of the tar. Indexes are keyed by the URL and
by what its server says of the file's state, and only whole tars get one.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm2clip.artifacts import fingerprint
from llm2clip.data.bad import BadImage, logger
from llm2clip.data.bytes import MAX_IMAGE_BYTES
from llm2clip.data.files import MAX_TEXT_BYTES, is_text, may_be_image, split_name
from llm2clip.data.images import check_header
from llm2clip.data.sample import Reading
from llm2clip.data.spec import File
from llm2clip.data.tars import Member, Tar, TarDamage, TarPart, scan
from llm2clip.data.urls import filesystem_of, is_url, url_errors
from llm2clip.errors import SourceError

STREAM_BLOCK_BYTES = 8 << 20
"""Read ahead in a tar behind a URL."""
FOLDER_VARIABLE = "LLM2CLIP_INDEX_CACHE"
"""Environment variable with the folder of the indexes."""
STATE = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "created", "blob_id", "xet_hash", "lfs")
"""Facts of a remote file that change when its content does; file systems give some of them."""


def tar_part(file: File, reading: Reading) -> TarPart:
    """A tar of samples, here or behind a URL."""
    return (RemoteTarPart if is_url(file.path) else TarPart)(file, reading)


class RemoteTarPart(TarPart):
    """A tar of samples behind a URL."""

    def check(self) -> str:
        """Nothing: opening it is the stream's business."""
        return ""

    def opened(self) -> Tar:
        """It, at its beginning."""
        try:
            return RemoteTar(self.path, self.reading)
        except url_errors() as error:
            raise SourceError(f"{self.path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


class RemoteTar(Tar):
    """A tar behind a URL; texts are kept and images looked at as they go by."""

    def __init__(self, url: str, reading: Reading) -> None:
        self.path, self.reading = url, reading
        self._filesystem, self._inner = filesystem_of(url)
        info = self._filesystem.info(self._inner)
        self._knows_size = info.get("size") is not None  # some servers do not tell
        self.size = info["size"] if self._knows_size else 1 << 62
        self._index = TarIndex(url, info, images=reading.images)
        self._stream: Any = None
        self._position = 0

    def members(self) -> Iterator[Member]:
        """Its regular files, with the content of texts and, if images matter, what is wrong with images."""
        members = self._index.load()
        if members is not None:
            yield from members
            return
        members = []
        try:
            for member in scan(self.read, self.size):
                members.append(self._look(member))
                yield members[-1]
        finally:
            if self._stream is not None:
                self._stream.close()
        self._index.save(members)

    def text(self, member: Member) -> bytes:
        """The content of a text member, kept while the tar went by."""
        return super().text(member) if member.content is None else member.content

    def check_image(self, member: Member) -> None:
        """What the image's header showed while the tar went by."""
        if member.defect is not None:
            raise member.defect

    def _look(self, member: Member) -> Member:
        ending, end = (split_name(member.name) or ("", "pyd"))[1], member.offset + member.size
        if is_text(ending) and member.size <= MAX_TEXT_BYTES:
            member = replace(member, content=self.read(member.size, member.offset))
        elif self.reading.images and may_be_image(ending) and 0 < member.size <= MAX_IMAGE_BYTES:
            try:
                check_header(io.BytesIO(self.read(member.size, member.offset)), f"{self.path}: {member.name}")
            except BadImage as error:
                member = replace(member, defect=error)
        self.read(0, end)
        if self._position < end:
            raise TarDamage("truncated tar", f"ends at byte {self._position}, within {member.name!r}", member.name)
        return member

    def read(self, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`, which never lies before the last ones read; fewer where the tar ends."""
        try:
            if self._stream is None:
                self._stream = self._filesystem.open(
                    self._inner, "rb", block_size=STREAM_BLOCK_BYTES, cache_type="readahead"
                )
            while self._position < offset and self._take(min(offset - self._position, STREAM_BLOCK_BYTES)):
                pass
            data = self._take(length) if self._position == offset else b""
            while len(data) < length and (more := self._take(length - len(data))):
                data += more
        except url_errors() as error:
            raise self._broken(str(error)) from None
        if self._position < offset + length and self._knows_size and self._position < self.size:
            raise self._broken(f"{self.size} bytes were expected")
        return data

    def _take(self, length: int) -> bytes:
        data: bytes = self._stream.read(length)
        self._position += len(data)
        return data

    def _broken(self, why: str) -> SourceError:
        return SourceError(
            f"{self.path} broke off at byte {self._position} ({why}); the same command goes on where it stopped"
        )


class TarIndex:
    """The index of one tar, if there is one; `info` is what its file system says of it.

    Whether `images` were looked at matters: what they showed is part of the index.
    """

    def __init__(self, url: str, info: Mapping[str, Any], *, images: bool) -> None:
        state = {name: str(info[name]) for name in STATE if info.get(name) is not None}
        self.path = index_folder() / f"{fingerprint([url, state, images])}.json" if state else None

    def load(self) -> list[Member] | None:
        """The tar's members; None if there is no index, or it is damaged."""
        if self.path is None or not self.path.exists():
            return None
        try:
            return [_member(*row) for row in json.loads(self.path.read_bytes())]
        except (OSError, ValueError, TypeError):  # written anew when the tar has gone by
            return None

    def save(self, members: Sequence[Member]) -> None:
        """Keep the index; without room or right to do so the tar is just read again next time."""
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.urandom(4).hex()}")  # several may write
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps([_row(member) for member in members]), encoding="ascii")
            os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("no index of remote tars is kept: %s; set %s to another folder", error, FOLDER_VARIABLE)


def index_folder() -> Path:
    """Where indexes lie: `$LLM2CLIP_INDEX_CACHE`, otherwise in the user's cache."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2clip" / "tar-indexes"


def _row(member: Member) -> list[Any]:
    text = None if member.content is None else member.content.decode("utf-8", "surrogateescape")
    return [member.name, member.offset, member.size, text, member.defect and member.defect.args]


def _member(name: str, offset: int, size: int, text: str | None, defect: list[str] | None) -> Member:
    content = None if text is None else text.encode("utf-8", "surrogateescape")
    return Member(name, offset, size, content, BadImage(*defect) if defect else None)
