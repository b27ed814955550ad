"""Several sources chained: order, ids, fingerprints, counting over all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm2clip.data.config import SourceConfig
from llm2clip.data.images import load_image
from llm2clip.data.source import Source, open_source
from llm2clip.errors import SourceError, TooManyBadSamples, UsageError

Open = Callable[..., Source]
Make = Callable[..., Path]


@pytest.fixture
def shards(tmp_path: Path, make_tar: Make, jpeg: bytes) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        make_tar(folder / f"{i:05d}.tar", {"a.jpg": jpeg, "a.txt": f"a{i}", "b.jpg": jpeg, "b.txt": f"b{i}"})
    return folder


def test_parts_follow_one_another_and_ids_stay_unique(shards: Path, source_of: Open, images_csv: Path) -> None:
    source = source_of(shards / "{00001..00002}.tar", images_csv, shards / "00000.tar")
    ids = [sample.id for sample in source]
    assert len(ids) == len(set(ids)) == 2 + 2 + 24 + 2
    assert [Path(sample_id).parts[-2:] for sample_id in ids[:3]] == [("00001", "a"), ("00001", "b"), ("00002", "a")]
    assert [sample.id for sample in source] == ids


def test_a_single_part_has_plain_ids(shards: Path, source_of: Open) -> None:
    assert [sample.id for sample in source_of(shards / "00000.tar")] == ["a", "b"]
    assert [sample.id for sample in source_of(shards)][:3] == ["00000/a", "00000/b", "00001/a"]


def test_every_image_can_be_loaded(shards: Path, source_of: Open) -> None:
    assert [load_image(sample.image).size for sample in source_of(shards)] == [(12, 8)] * 6


def test_the_fingerprint_moves_with_the_files_and_changes_with_them(
    shards: Path, source_of: Open, tmp_path: Path
) -> None:
    first = source_of(shards).fingerprint
    shutil.copytree(shards, tmp_path / "elsewhere")
    assert source_of(tmp_path / "elsewhere").fingerprint == source_of(shards / "*.tar").fingerprint == first
    assert source_of(shards, captions={"x": "txt"}).fingerprint != first
    assert source_of(shards, image="jpg").fingerprint != first
    assert source_of(shards / "00001.tar", shards / "00000.tar", shards / "00002.tar").fingerprint != first
    with (tmp_path / "elsewhere" / "00001.tar").open("ab") as file:
        file.write(b"\0")
    assert source_of(tmp_path / "elsewhere").fingerprint != first


def test_the_fingerprint_of_a_image_folder(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(jpeg)
        (tmp_path / name / "a.txt").write_text("a")
    one = source_of(tmp_path / "one").fingerprint
    (tmp_path / "one").rename(tmp_path / "parent")
    (tmp_path / "parent" / "a.txt").write_text("longer")
    assert source_of(tmp_path / "parent").fingerprint != one


def test_a_part_alone_for_going_on_after_a_stop(shards: Path, source_of: Open) -> None:
    source = source_of(shards)
    whole = list(source)
    assert source.num_parts == 3
    assert [sample for i in range(3) for sample in source.part(i)] == whole
    assert list(source.part(2)) == whole[4:]


def test_iterating_again_counts_afresh(tmp_path: Path, source_of: Open, make_tar: Make, jpeg: bytes) -> None:
    source = source_of(make_tar(tmp_path / "a.tar", {"1.jpg": jpeg, "1.txt": "x", "2.jpg": b"", "2.txt": "y"}))
    for _ in range(2):
        assert len(list(source)) == 1
        assert source.bad.counts == {"empty image": 1}


def test_too_many_bad_samples_stop_the_run(tmp_path: Path, make_tar: Make, jpeg: bytes) -> None:
    members = {
        name: content for i in range(40) for name, content in ((f"{i}.jpg", jpeg if i % 10 else b""), (f"{i}.txt", "x"))
    }
    tar = make_tar(tmp_path / "a.tar", members)
    assert len(list(open_source(SourceConfig(data=(str(tar),), max_bad_fraction=0.1)))) == 36
    with pytest.raises(
        TooManyBadSamples, match=r"4 of 40 samples are bad, above max_bad_fraction 0\.05: 4 empty image"
    ):
        list(open_source(SourceConfig(data=(str(tar),))))


def test_a_hopeless_run_stops_before_its_end(tmp_path: Path, source_of: Open, jpeg: bytes) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg)
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,x\n" for i in range(5000)))
    source = source_of(tmp_path / "t.csv", max_bad_fraction=0.5)
    with pytest.raises(TooManyBadSamples, match="999 of 1000 samples are bad"):
        list(source)


def test_nothing_usable_is_an_error_even_if_all_may_be_bad(tmp_path: Path, source_of: Open) -> None:
    (tmp_path / "t.csv").write_text("image,caption\nno.jpg,x\n")
    with pytest.raises(SourceError, match="no usable samples in t"):
        list(source_of(tmp_path / "t.csv"))
    (tmp_path / "u.csv").write_text("image,caption\n")
    with pytest.raises(SourceError, match="no usable samples in u"):
        list(source_of(tmp_path / "u.csv"))


def test_the_same_file_twice_is_refused(shards: Path, source_of: Open) -> None:
    with pytest.raises(UsageError, match=r"names .*00001\.tar twice; name it once"):
        source_of(shards, shards / "00001.tar")


def test_a_file_that_vanishes_is_one_line(shards: Path, source_of: Open) -> None:
    source = source_of(shards)
    (shards / "00002.tar").unlink()
    with pytest.raises(SourceError, match=r"00002\.tar cannot be read: No such file or directory"):
        list(source)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"data": ()}, r"no source is given; name one or several, for example data=\('captions.csv',\)"),
        ({"data": "a.csv"}, r"^data is 'a.csv'; give paths, as in data=\('a.csv',\)$"),
        ({"data": ("",)}, "give paths"),
        ({"data": ("a.csv",), "max_bad_fraction": 2.0}, "^max_bad_fraction is 2.0; it is a share between 0 and 1"),
        (
            {"data": ("a.csv",), "captions": ["a"]},
            r"^captions is \['a'\]; give each kind its column, as in captions={'short': 'caption'}",
        ),
    ],
)
def test_impossible_settings(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        open_source(SourceConfig(**settings))  # type: ignore[arg-type]


def test_errors_name_the_setting_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").touch()
    for spec, complaint in (("no.csv", "no such file"), ("empty", "is an empty folder"), ("a.md", "unknown ending")):
        with pytest.raises(UsageError, match=rf"^eval_data {tmp_path}/{spec}:? {complaint}"):
            open_source(SourceConfig(data=(str(tmp_path / spec),)), setting="eval_data")
