"""Samples of webdataset tars as img2dataset writes them: local ones by random access, those behind a URL as a stream.

A tar that is cut off or damaged gives the samples before the damage, and is counted and named.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from llm2clip.captions.bad import BadSamples, logger
from llm2clip.captions.members import Assembler, check_columns
from llm2clip.captions.open_tars import StreamedTar, Tar
from llm2clip.captions.parts import Reading
from llm2clip.captions.reading import is_url, url_errors
from llm2clip.captions.sample import Sample
from llm2clip.captions.specs import File
from llm2clip.captions.tars import BLOCK, ZEROS, Member, TarDamage, parse_header, split_name
from llm2clip.errors import SourceError

NUM_MEMBERS_CHECKED = 60
"""Members whose columns are looked at before a run begins."""
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")
"""First bytes of gzip, bzip2, xz and zstd files."""


class TarPart:
    """A tar of samples.

    Args:
        file: where it lies.
        reading: how its members are understood.
    """

    def __init__(self, file: File, reading: Reading) -> None:
        self.path, self.size, self.reading = file.path, file.size, reading

    def check(self) -> None:
        """Check that it is a tar, and that its first samples have what is asked for."""
        if is_url(self.path):  # opening it is the stream's business
            return
        if self.size == 0:
            raise SourceError(f"{self.path} is empty (0 bytes); fetch or write it again")
        with self._open() as tar:
            start = tar.read(BLOCK, 0)
            packed = (
                "but compressed; unpack it" if start.startswith(PACKED) else "or its start is damaged; fetch it again"
            )
            try:
                parse_header((start + ZEROS)[:BLOCK])
            except TarDamage:
                if start != ZEROS:
                    raise SourceError(f"{self.path} is no tar {packed}") from None
            groups, _, damage = group(itertools.islice(tar.members(), NUM_MEMBERS_CHECKED))
            if damage is None:
                check_columns(self.path, list(groups.values()), self.reading, tar)

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples in the order of the tar; members of a sample need not lie side by side."""
        with self._open() as tar:
            groups, repeated, damage = group(tar.members())
            for name in repeated:
                bad.note(name, "member twice in tar", self.path)
            if damage is not None:
                cut_off = (split_name(damage.member) or ("",))[0]
                bad.add(cut_off or os.path.basename(self.path), damage.cause, f"{self.path} {damage.detail}")
                logger.warning("%s %s; %d samples before that are kept", self.path, damage.detail, len(groups))
            assembler = Assembler(self.reading, bad)
            for key, endings in groups.items():
                if sample := assembler.assemble(key, endings, tar):
                    yield sample

    def _open(self) -> Tar:
        try:
            return StreamedTar(self.path, self.reading) if is_url(self.path) else Tar(self.path)
        except url_errors() as error:
            raise SourceError(f"{self.path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def group(members: Iterator[Member]) -> tuple[dict[str, dict[str, Member]], list[str], TarDamage | None]:
    """Members by key, then by ending, in the order of the tar; names that came again; and the damage met, if any.

    The sample that a damage cut off is left out.
    """
    groups: dict[str, dict[str, Member]] = {}
    repeated: list[str] = []
    try:
        for member in members:
            key, ending = split_name(member.name) or ("", "")
            if key and ending not in groups.setdefault(key, {}):
                groups[key][ending] = member
            elif key:
                repeated.append(member.name)
    except TarDamage as damage:
        groups.pop((split_name(damage.member) or ("",))[0], None)
        return groups, repeated, damage
    return groups, repeated, None
