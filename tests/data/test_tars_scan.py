"""Members of tars: found where Python's tarfile finds them, and nothing that would lead out."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llm2clip.data.files import split_name
from llm2clip.data.tars import Member, TarDamage, scan

Contents = dict[str, bytes]


def members_of(data: bytes) -> list[Member]:
    return list(scan(lambda length, offset: data[offset : offset + length], len(data)))


LONG = "folder-" + "x" * 90 + "/" + "画 面 " * 20 + ".jpg"
CONTENTS: Contents = {"a.jpg": b"1" * 700, "d/ä.txt": b"", LONG: b"long", "p" * 120 + "/q.txt": b"p", "z.json": b"{}"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_same_members_as_tarfile(tmp_path: Path, make_tar: Callable[..., Path], form: int) -> None:
    contents = {name: data for name, data in CONTENTS.items() if form != tarfile.USTAR_FORMAT or name != LONG}
    data = make_tar(tmp_path / "a.tar", contents, form).read_bytes()
    found = members_of(data)
    assert {member.name: data[member.offset : member.offset + member.size] for member in found} == contents
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in tar]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_only_regular_files_are_told_of(form: int) -> None:
    """Links with long names have headers of their own before them, which say nothing of the file that follows."""
    file = io.BytesIO()
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for kind in kinds:
            for name in (f"{ord(kind):03d}.jpg", "long" * 60 + f"/{ord(kind):03d}.jpg"):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/" + "passwd" * 30
                tar.addfile(info)
                after = tarfile.TarInfo(f"after-{name[:3]}-{ord(kind)}.txt")
                after.size = 3
                tar.addfile(after, io.BytesIO(b"abc"))
    data = file.getvalue()
    found = members_of(data)
    assert [member.name for member in found] == [
        f"after-{n}-{ord(k)}.txt" for k in kinds for n in (f"0{ord(k)}", "lon")
    ]
    assert all(data[member.offset :][:3] == b"abc" and member.size == 3 for member in found)


@pytest.mark.parametrize("kind", [b"0", b"\0", b"7"])
def test_every_type_flag_of_a_regular_file(kind: bytes) -> None:
    info = tarfile.TarInfo("a.txt")
    info.type = kind
    assert [member.name for member in members_of(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))] == ["a.txt"]


def test_a_tar_that_ends_with_a_member(tmp_path: Path, make_tar: Callable[..., Path]) -> None:
    """Exactly at its last byte, or a byte before."""
    data = make_tar(tmp_path / "a.tar", {"a.txt": b"x" * 512, "b.txt": b"y" * 512}).read_bytes()
    end = 4 * 512
    for cut, names, detail in (
        (end, ["a.txt", "b.txt"], "without an end mark"),
        (end - 1, ["a.txt"], "within 'b.txt'"),
    ):
        found: list[str] = []
        with pytest.raises(TarDamage, match=detail):
            found.extend(member.name for member in scan(lambda n, at, cut=cut: data[:cut][at : at + n], cut))
        with pytest.raises(TarDamage):
            for member in scan(lambda n, at, cut=cut: data[:cut][at : at + n], cut):
                found.append(member.name)
        assert found[-len(names) :] == names and set(found) == set(names)


def test_sizes_above_8_gib_are_read_in_both_notations() -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.jpg")
        info.size = 9 << 30
        data = info.tobuf(form)
        found = scan(lambda length, offset, data=data: data[offset : offset + length], 10 << 30)
        assert next(found).size == 9 << 30
        with pytest.raises(TarDamage, match="end mark"):
            next(found)


def test_every_cut_gives_whole_members_and_then_the_damage(tmp_path: Path, make_tar: Callable[..., Path]) -> None:
    data = make_tar(tmp_path / "a.tar", CONTENTS, tarfile.PAX_FORMAT).read_bytes()
    whole = members_of(data)
    for cut in range(0, whole[-1].offset + 512, 61):
        found: list[Member] = []
        with pytest.raises(TarDamage) as caught:
            for member in scan(lambda length, offset, end=cut: data[:end][offset : offset + length], cut):
                found.append(member)
        assert caught.value.cause == "truncated tar"
        assert found == [member for member in whole if member.offset + member.size <= cut]


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path, make_tar: Callable[..., Path]) -> None:
    data = make_tar(tmp_path / "a.tar", CONTENTS, tarfile.PAX_FORMAT).read_bytes()
    num_damaged = 0
    for place in range(0, 6000, 7):
        broken = bytearray(data)
        broken[place] ^= 0x35
        try:
            members_of(bytes(broken))
        except TarDamage as damage:
            num_damaged += 1
            assert damage.cause in {"damaged tar", "truncated tar"}
    assert num_damaged > 100


@pytest.mark.parametrize(
    "record", [b"x path=a\n", b"999 path=a\n", b"0 path=a\n", b"12 path\n", b"8 size=\n", b"11 size=xx\n"]
)
def test_damaged_pax_headers(record: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + tarfile.TarInfo("a").tobuf() + bytes(1024)
    with pytest.raises(TarDamage, match="damaged extended header"):
        members_of(data)


def test_a_name_of_a_gigabyte_is_not_read() -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    data = info.tobuf(tarfile.GNU_FORMAT)
    asked = []

    def read(length: int, offset: int) -> bytes:
        asked.append(length)
        return data[offset : offset + length]

    with pytest.raises(TarDamage, match="extended header of 1073741824 bytes"):
        list(scan(read, 1 << 40))
    assert max(asked) == 512


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("000000012.jpg", ("000000012", "jpg")),
        ("./a.b/c.short.TXT", ("a.b/c", "short.txt")),
        ("no_ending", ("no_ending", "")),
        ("a/.DS_Store", None),
        ("._x.jpg", None),
        ("../../etc/x.jpg", ("../../etc/x", "jpg")),
    ],
)
def test_keys_and_endings(name: str, split: tuple[str, str] | None) -> None:
    assert split_name(name) == split


def test_a_damaged_header_is_told_by_its_place() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    data = bytearray(file.getvalue())
    data[1024 + 148 : 1024 + 156] = b"no sum!!"  # the check sum of the second header
    with pytest.raises(TarDamage) as caught:
        members_of(bytes(data))
    assert (caught.value.cause, caught.value.detail) == ("damaged tar", "has no member header at byte 1024")


def test_a_long_name_before_a_long_link_is_kept() -> None:
    """GNU tar and Python write the two headers in the other order; what a link is called must not depend on it."""
    blocks = []
    for kind, text in ((b"L", "folder/" + "n" * 120 + ".txt"), (b"K", "t" * 120)):
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, len(text) + 1
        blocks += [info.tobuf(tarfile.GNU_FORMAT), (text.encode() + b"\0").ljust(512, b"\0")]
    last = tarfile.TarInfo("short.txt")
    last.size = 3
    blocks += [last.tobuf(tarfile.GNU_FORMAT), b"abc".ljust(512, b"\0"), b"\0" * 1024]
    assert [member.name for member in members_of(b"".join(blocks))] == ["folder/" + "n" * 120 + ".txt"]
