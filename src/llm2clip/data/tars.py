"""The tar format: the members of a tar and where they lie, by a scan of its headers alone, nothing extracted.

A scan reads 512 bytes a member and skips the rest. Only regular files are told of; links, devices and folders are
passed over, so a member can never lead out of the tar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llm2clip.captions.bad import BadPicture

BLOCK = 512
ZEROS = bytes(BLOCK)
REGULAR = b"0\0" + b"7"
"""Type flags of regular files."""
EXTENDED = b"xgL"
"""Type flags of headers that speak of the member after them: PAX, PAX for all, GNU long name."""
MAX_EXTENDED_BYTES = 1 << 20
"""Longer extended headers are damage."""

Read = Callable[[int, int], bytes]
"""(length, offset) -> bytes, fewer where the file ends."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar.

    Attributes:
        offset: its first byte in the tar.
        size: its bytes.
        content: its text, kept only where the tar cannot be read twice.
        defect: what its first bytes showed, likewise.
    """

    name: str
    offset: int
    size: int
    content: bytes | None = None
    defect: BadPicture | None = None


class TarDamage(Exception):
    """A tar that ends too early or holds bytes that are no header; `member` is the name of one that is cut off."""

    def __init__(self, cause: str, detail: str, member: str = "") -> None:
        super().__init__(cause, detail, member)
        self.cause, self.detail, self.member = cause, detail, member


def scan(read: Read, size: int) -> Iterator[Member]:
    """The regular files of a tar, in order; long names of GNU tar and PAX included.

    Args:
        read: gives bytes at an offset; the offsets asked for only grow.
        size: bytes of the tar.

    Raises:
        TarDamage: after the last whole member, if there is no proper end.
    """
    position = 0
    extended: dict[str, Any] = {}
    while (header := read(BLOCK, position)) != ZEROS:
        if len(header) < BLOCK:
            raise TarDamage("truncated tar", f"ends at byte {position + len(header)} without an end mark")
        name, length, kind = parse_header(header, position)
        name, length = extended.get("path", name), extended.get("size", length)
        start = position + BLOCK
        if start + length > size:
            raise TarDamage("truncated tar", f"ends at byte {size}, within {name!r}", name if kind in REGULAR else "")
        if kind in EXTENDED:
            extended |= _extended_header(read, kind, start, length)
        else:
            extended = {}
            if kind in REGULAR:
                yield Member(name, start, length)
        position = start + -(-length // BLOCK) * BLOCK


def parse_header(header: bytes, position: int = 0) -> tuple[str, int, int]:
    """Name, size and type flag in a header block.

    Raises:
        TarDamage: if its checksum is wrong.
    """
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
        if header[124] & 0x80:  # GNU: binary, for files above 8 GiB
            length = int.from_bytes(header[125:136], "big")
        else:
            length = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        stored, length = -1, 0
    if stored != sum(header) - sum(header[148:156]) + 8 * ord(" ") or length < 0:
        raise TarDamage("damaged tar", f"has no member header at byte {position}")
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), length, header[156]


def _extended_header(read: Read, kind: int, offset: int, length: int) -> dict[str, Any]:
    """What an extra header says of the member after it: `path` and `size`."""
    if length > MAX_EXTENDED_BYTES:
        raise TarDamage("damaged tar", f"has an extended header of {length} bytes at byte {offset}")
    data = read(length, offset)
    if kind == ord("L"):
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind == ord("g"):  # nothing it may say of all members concerns us
        return {}
    try:
        return dict(_pax_records(data))
    except (ValueError, IndexError):
        raise TarDamage("damaged tar", f"has a damaged extended header at byte {offset}") from None


def _pax_records(data: bytes) -> Iterator[tuple[str, Any]]:
    """`path` and `size` in the records ("27 path=..." and a newline) of a PAX header."""
    while data.strip(b"\0"):
        end = int(data.split(b" ", 1)[0])
        if not 4 < end <= len(data):
            raise ValueError(end)
        key, value = data[:end].split(b" ", 1)[1].rstrip(b"\n").split(b"=", 1)
        if key == b"path":
            yield "path", value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            yield "size", max(int(value), 0)
        data = data[end:]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and ending of a member, split at the file name's first dot as webdataset does; None for hidden files.

    >>> split_name("./a/0001.short.TXT")
    ('a/0001', 'short.txt')
    """
    folder, slash, file = name.removeprefix("./").rpartition("/")
    key, _, ending = file.partition(".")
    return (folder + slash + key, ending.lower()) if key else None
