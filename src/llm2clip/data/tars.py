"""Samples of webdataset tars as img2dataset writes them, by a scan of their headers alone, nothing extracted.

A scan reads 512 bytes a member and skips the rest. Only regular files are told of; links, devices and folders are
passed over, so a member can never lead out of the tar. A tar that is cut off or damaged gives the samples before the
damage, and is counted and named.
"""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llm2clip.data.bad import BadImage, BadSamples, logger
from llm2clip.data.bytes import OpenFile, read_at
from llm2clip.data.files import MAX_TEXT_BYTES, Assembler, check_columns, group_members, split_name
from llm2clip.data.images import check_place
from llm2clip.data.sample import ImageRef, Reading, Sample
from llm2clip.data.spec import File
from llm2clip.errors import SourceError

BLOCK = 512
ZEROS = bytes(BLOCK)
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
"""Headers that speak of the member after them: PAX, PAX for all, GNU long name and long link."""
MAX_EXTENDED_BYTES = 1 << 20
"""Longer extended headers are damage."""
NUM_MEMBERS_CHECKED = 60
"""Members whose columns are looked at before a run begins."""
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")
"""First bytes of gzip, bzip2, xz and zstd files."""
Read = Callable[[int, int], bytes]
"""(length, offset) -> bytes, fewer where the file ends."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar, and where its bytes lie there."""

    name: str
    offset: int
    size: int
    content: bytes | None = None
    """Its text, kept only where the tar cannot be read twice."""
    defect: BadImage | None = None
    """What its first bytes showed, likewise."""


class TarDamage(Exception):
    """A tar that ends too early or holds bytes that are no header; `member` is the name of one that is cut off."""

    def __init__(self, cause: str, detail: str, member: str = "") -> None:
        super().__init__(cause, detail, member)
        self.cause, self.detail, self.member = cause, detail, member


def scan(read: Read, size: int) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes, in order; long names of GNU tar and PAX included.

    The offsets that `read` is asked for only grow. `tarfile` parses each header, but does not walk over them: it takes
    a damaged one for the end, and versions in use follow negative sizes for ever and pass over damaged PAX records.

    Raises:
        TarDamage: after the last whole member, if there is no proper end.
    """
    position = 0
    extended: dict[str, Any] = {}
    while (header := read(BLOCK, position)) != ZEROS:
        if len(header) < BLOCK:
            raise TarDamage("truncated tar", f"ends at byte {position + len(header)} without an end mark")
        info = parse_header(header, position)
        name, length = extended.get("path", info.name), extended.get("size", info.size)
        start = position + BLOCK
        if start + length > size:
            cut_off = name if info.type in REGULAR else ""
            raise TarDamage("truncated tar", f"ends at byte {size}, within {name!r}", cut_off)
        if info.type in EXTENDED:
            extended |= _extended_header(read, info.type, start, length)
        else:
            extended = {}
            if info.type in REGULAR:
                yield Member(name, start, length)
        position = start + -(-length // BLOCK) * BLOCK


def parse_header(header: bytes, position: int = 0) -> tarfile.TarInfo:
    """What a header block says; TarDamage if its checksum is wrong."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        info = None
    if info is None or info.size < 0:
        raise TarDamage("damaged tar", f"has no member header at byte {position}")
    return info


def _extended_header(read: Read, kind: bytes, offset: int, length: int) -> dict[str, Any]:
    """What an extra header says of the member after it: `path` and `size`."""
    if length > MAX_EXTENDED_BYTES:
        raise TarDamage("damaged tar", f"has an extended header of {length} bytes at byte {offset}")
    data = read(length, offset)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):  # of all members, or of where a link leads: not of use
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


def group(members: Iterator[Member]) -> tuple[dict[str, dict[str, Member]], list[str], TarDamage | None]:
    """Members by key, then by ending, in the tar's order; names that came again; and the damage met, if any.

    The sample that a damage cut off is left out.
    """
    met: list[TarDamage] = []
    groups, repeated = group_members((member.name, member) for member in _with_cut_off(members, met))
    whole = {key: endings for key, endings in groups.items() if not any(m.size < 0 for m in endings.values())}
    return whole, repeated, met[0] if met else None


def _with_cut_off(members: Iterator[Member], met: list[TarDamage]) -> Iterator[Member]:
    """`members`, and after a damage, which goes to `met`, the one that it cut off, of size -1."""
    try:
        yield from members
    except TarDamage as damage:
        met.append(damage)
        if damage.member:
            yield Member(damage.member, 0, -1)


class Tar:
    """A tar on this machine, open for random access."""

    def __init__(self, path: str) -> None:
        self.path, self._file = path, OpenFile(path)
        self.size = os.fstat(self._file.descriptor).st_size

    def read(self, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`, fewer where the tar ends."""
        return read_at(self._file.descriptor, length, offset)

    def members(self) -> Iterator[Member]:
        """Its regular files."""
        return scan(self.read, self.size)

    def text(self, member: Member) -> bytes:
        """The content of a text member."""
        if member.size > MAX_TEXT_BYTES:
            raise BadImage("text too large", f"{self.path}: {member.name} has {member.size} bytes")
        return self.read(member.size, member.offset)

    def locate(self, member: Member) -> ImageRef:
        """Where a member's bytes lie."""
        return ImageRef(self.path, member.offset, member.size)

    def check_image(self, member: Member) -> None:
        """Look at an image's header."""
        check_place(self.locate(member), f"{self.path}: {member.name}")


class TarPart:
    """A tar of samples."""

    def __init__(self, file: File, reading: Reading) -> None:
        self.path = self.name = file.path
        self.size, self.reading = file.size, reading

    def opened(self) -> Tar:
        """It, open for reading."""
        return Tar(self.path)

    def check(self) -> str:
        """Check that it is a tar, and that its first samples have what is asked for."""
        if self.size == 0:
            raise SourceError(f"{self.path} is empty (0 bytes); fetch or write it again")
        tar = self.opened()
        start = tar.read(BLOCK, 0)
        packed = "but compressed; unpack it" if start.startswith(PACKED) else "or its start is damaged; fetch it again"
        try:
            parse_header(start.ljust(BLOCK, b"\0"))
        except TarDamage:
            if start != ZEROS:
                raise SourceError(f"{self.path} is no tar {packed}") from None
        groups, _, damage = group(itertools.islice(tar.members(), NUM_MEMBERS_CHECKED))
        return "" if damage else check_columns(self.path, list(groups.values()), self.reading, tar)

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples in the order of the tar; members of a sample need not lie side by side."""
        tar = self.opened()
        groups, repeated, damage = group(tar.members())
        for name in repeated:
            bad.note(name, "member twice in tar", self.path)
        if damage is not None:
            cut_off = (split_name(damage.member) or ("",))[0]
            bad.add(cut_off or os.path.basename(self.path), damage.cause, f"{self.path} {damage.detail}")
            logger.warning("%s %s; %d samples before that are kept", self.path, damage.detail, len(groups))
        assembler = Assembler(self.reading, bad, tar)
        yield from filter(None, itertools.starmap(assembler.assemble, groups.items()))
