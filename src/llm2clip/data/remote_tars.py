"""A tar open for reading: a local one by random access, one behind a URL as a stream from front to end."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llm2clip.captions.bad import BadPicture
from llm2clip.captions.members import MAX_TEXT_BYTES, is_text, may_be_picture
from llm2clip.captions.parts import Reading
from llm2clip.captions.pictures import check_header
from llm2clip.captions.reading import MAX_PICTURE_BYTES, filesystem_of, open_regular, read_at, url_errors
from llm2clip.captions.sample import PictureRef
from llm2clip.captions.tar_index import TarIndex
from llm2clip.captions.tars import Member, Read, TarDamage, scan, split_name
from llm2clip.errors import SourceError

STREAM_BLOCK_BYTES = 8 << 20
"""Read ahead in a tar behind a URL."""


class Tar:
    """A tar on this machine, open for random access."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = open_regular(path)
        self.size = os.fstat(self._descriptor).st_size

    def __enter__(self) -> Tar:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def read(self, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`, fewer where the tar ends."""
        try:
            return read_at(self._descriptor, length, offset)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from None

    def members(self) -> Iterator[Member]:
        """Its regular files."""
        return scan(self.read, self.size)

    def text(self, member: Member) -> bytes:
        """The content of a text member."""
        if member.size > MAX_TEXT_BYTES:
            raise BadPicture("text too large", f"{self.path}: {member.name} has {member.size} bytes")
        return self.read(member.size, member.offset)

    def locate(self, member: Member) -> PictureRef:
        """Where a member's bytes lie."""
        return PictureRef(self.path, member.offset, member.size)

    def check_picture(self, member: Member) -> None:
        """Look at a picture's header."""
        view = io.BufferedReader(_Range(self.read, member.offset, member.size), 4096)
        check_header(view, f"{self.path}: {member.name}")


class StreamedTar(Tar):
    """A tar behind a URL, read once from front to end; texts are kept and pictures looked at on the way."""

    def __init__(self, url: str, reading: Reading) -> None:
        self.path, self.reading = url, reading
        self._filesystem, self._inner = filesystem_of(url)
        info = self._filesystem.info(self._inner)
        self._knows_size = info.get("size") is not None  # some servers do not tell
        self.size = info["size"] if self._knows_size else 1 << 62
        self._index = TarIndex(url, info, pictures=reading.pictures)
        self._file: Any = None
        self._position = 0

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def members(self) -> Iterator[Member]:
        """Its regular files, with the content of texts and, if pictures matter, what is wrong with pictures."""
        members = self._index.load()
        if members is not None:
            yield from members
            return
        members = []
        for member in scan(self.read, self.size):
            members.append(self._look(member))
            yield members[-1]
        self._index.save(members)

    def _look(self, member: Member) -> Member:
        ending = (split_name(member.name) or ("", "pyd"))[1]
        if is_text(ending) and member.size <= MAX_TEXT_BYTES:
            return replace(member, content=self._whole(member))
        if self.reading.pictures and may_be_picture(ending) and 0 < member.size <= MAX_PICTURE_BYTES:
            return replace(member, defect=self._defect(member))
        return member

    def read(self, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`, which never lies before the last ones read; fewer where the tar ends."""
        try:
            if self._file is None:
                self._file = self._filesystem.open(
                    self._inner, "rb", block_size=STREAM_BLOCK_BYTES, cache_type="readahead"
                )
            while self._position < offset and self._take(min(offset - self._position, STREAM_BLOCK_BYTES)):
                pass
            data = self._take(length) if self._position == offset else b""
            while len(data) < length and (more := self._take(length - len(data))):
                data += more
        except url_errors() as error:
            raise self._broken(str(error)) from None
        if len(data) < length and self._knows_size and self._position < self.size:
            raise self._broken(f"{self.size} bytes were expected")
        return data

    def _take(self, length: int) -> bytes:
        data: bytes = self._file.read(length)
        self._position += len(data)
        return data

    def _broken(self, why: str) -> SourceError:
        return SourceError(
            f"{self.path} broke off at byte {self._position} ({why}); the same command goes on where it stopped"
        )

    def _whole(self, member: Member) -> bytes:
        content = self.read(member.size, member.offset)
        if len(content) < member.size:
            raise TarDamage("truncated tar", f"ends at byte {self._position}, within {member.name!r}", member.name)
        return content

    def _defect(self, member: Member) -> BadPicture | None:
        try:
            check_header(io.BytesIO(self._whole(member)), f"{self.path}: {member.name}")
        except BadPicture as error:
            return error
        return None

    def text(self, member: Member) -> bytes:
        """The content of a text member, kept while the tar went by."""
        return super().text(member) if member.content is None else member.content

    def check_picture(self, member: Member) -> None:
        """What the picture's header showed while the tar went by."""
        if member.defect is not None:
            raise member.defect


class _Range(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, read: Read, offset: int, size: int) -> None:
        self._read, self._offset, self._size, self._position = read, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._size - self._position), 0)
        data = self._read(length, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
