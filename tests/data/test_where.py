"""Images that are not where a table says: told at once, with where they are and the folder to give."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm2clip.data import source, where
from llm2clip.data.config import SourceConfig
from llm2clip.data.source import Source, open_source
from llm2clip.data.where import find_root
from llm2clip.errors import UsageError, settings_as_flags

Open = Callable[..., Source]


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """Messages as the command line has them, each told as if for the first time."""
    source._tell.cache_clear()
    with settings_as_flags():
        yield


@pytest.fixture
def place(tmp_path: Path, jpeg: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `pictures/a/0.jpg` to `3.jpg`, beside it `tables/captions.csv`, which names them `a/0.jpg`."""
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for i in range(4):
        (tmp_path / "pictures" / "a" / f"{i}.jpg").write_bytes(jpeg + bytes([i]))
    write(tmp_path, *(f"a/{i}.jpg" for i in range(4)))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def write(place: Path, *names: str) -> None:
    lines = ["image,caption", *(f"{name},words {i}" for i, name in enumerate(names))]
    (place / "tables" / "captions.csv").write_text("".join(f"{line}\n" for line in lines))


def opened(place: Path, *, images: bool = True, **settings: object) -> Source:
    config = SourceConfig(data=(str(place / "tables" / "captions.csv"),), **settings)
    return open_source(config, images=images)


def test_where_no_image_is_there_the_folder_to_give_is_named(place: Path) -> None:
    with pytest.raises(UsageError) as told:
        opened(place)
    assert str(told.value) == (
        f"{place}/tables/captions.csv: none of the first 4 images that it names is there, such as "
        f"{place}/tables/a/0.jpg; there are such files in {place}/pictures: give --image-root {place}/pictures"
    )


def test_with_the_folder_the_images_are_read_from_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in (str(place / "pictures"), "../pictures", f"{place}/pictures/"):
        samples = list(opened(place, image_root=root))
        assert [sample.image.path for sample in samples] == [f"{place}/pictures/a/{i}.jpg" for i in range(4)]
        assert [sample.id for sample in samples] == [f"a/{i}.jpg" for i in range(4)]


def test_a_folder_below_the_current_one_is_named_as_one_types_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UsageError, match=r"/pictures: give --image-root pictures$"):
        opened(place)
    monkeypatch.chdir(place / "pictures")
    with pytest.raises(UsageError, match=r"/pictures: give --image-root \.$"):
        opened(place)


def test_without_the_flag_paths_are_those_beside_the_table(place: Path, jpeg: bytes) -> None:
    (place / "tables" / "a").mkdir()
    for i in range(4):
        (place / "tables" / "a" / f"{i}.jpg").write_bytes(jpeg + bytes([i]))
    plain = opened(place)
    assert [sample.image.path for sample in plain] == [f"{place}/tables/a/{i}.jpg" for i in range(4)]
    assert opened(place, image_root=str(place / "pictures")).fingerprint == plain.fingerprint


def test_the_folder_does_not_let_a_table_name_what_is_outside_of_it(place: Path) -> None:
    (place / "pictures" / "b").mkdir()
    root = str(place / "pictures" / "b")
    write(place, "../a/0.jpg")
    with pytest.raises(UsageError, match="lies outside the table's folder"):
        opened(place, image_root=root)
    assert len(list(opened(place, image_root=root, allow_outside=True))) == 1


def test_a_folder_that_is_not_there(place: Path) -> None:
    with pytest.raises(
        UsageError, match="--image-root nowhere is no folder; give the one that the images' paths start"
    ):
        opened(place, image_root="nowhere")


def test_a_teacher_is_warned_once_and_has_its_captions(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert len(list(opened(place, images=False))) == 4
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and f"give --image-root {place}/pictures (not needed for captions alone" in told[0]
    caplog.clear()
    assert len(list(opened(place, images=False, image_root=str(place / "pictures")))) == 4
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_where_some_are_there_it_is_a_warning(place: Path, jpeg: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (place / "tables" / "a").mkdir()
    (place / "tables" / "a" / "2.jpg").write_bytes(jpeg)
    assert len(list(opened(place, max_bad_fraction=0.9))) == 1
    assert (
        f"3 of the first 4 images that it names are not there, such as {place}/tables/a/0.jpg; there are" in caplog.text
    )
    assert f"give --image-root {place}/pictures" in caplog.text
    for i in (0, 1):
        (place / "tables" / "a" / f"{i}.jpg").write_bytes(jpeg + bytes([i]))
    caplog.clear()
    source._tell.cache_clear()
    opened(place)
    assert "of the first" not in caplog.text, "one of four is missing, which is told when it is read"


def test_one_image_among_a_thousand_is_enough_to_go_on(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(place, *(f"{i}.jpg" for i in range(900)), "../pictures/a/0.jpg")
    opened(place, allow_outside=True)
    assert "900 of the first 901 images that it names are not there" in caplog.text


def test_a_file_by_that_name_that_no_folder_leads_to(place: Path) -> None:
    write(place, "b/0.jpg", "b/1.jpg")
    with pytest.raises(UsageError) as told:
        opened(place)
    assert str(told.value).endswith(
        f"there is {place}/pictures/a/0.jpg, but no folder from which the table's paths would lead to such files"
    ) or str(told.value).endswith("a/1.jpg, but no folder from which the table's paths would lead to such files")


def test_no_file_by_that_name(place: Path) -> None:
    write(place, "a/x.jpg")
    with pytest.raises(UsageError) as told:
        opened(place)
    below = f"{place}/tables and {place}/elsewhere"
    assert str(told.value).endswith(
        f"no file of that name was found below {below}; give their folder: --image-root DIR"
    )


def test_of_two_folders_the_one_with_more_of_the_images_is_named(tmp_path: Path) -> None:
    for name in ("one/a.jpg", "two/a.jpg", "two/b.jpg", "two/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_root(["a.jpg", "b.jpg", "c.jpg"], [str(tmp_path)])[0] == f"{tmp_path}/two"
    found = find_root(["a.jpg", "x.jpg", "y.jpg"], [str(tmp_path)])
    assert found in [("", f"{tmp_path}/{name}/a.jpg") for name in ("one", "two")], "one of three shows nothing"
    assert find_root(["x.jpg"], [str(tmp_path)]) == ("", "")
    assert find_root(["/gone/a.jpg"], [str(tmp_path / "one")]) == ("", f"{tmp_path}/one/a.jpg"), "absolute paths"


def test_the_search_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0").mkdir()
    for i in range(8):
        (tmp_path / f"{i}.txt").touch()
    (tmp_path / "0" / "a.jpg").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.jpg").touch()
    os.symlink(tmp_path, tmp_path / "0" / "circle")
    assert find_root(["a.jpg"], [str(tmp_path)])[0] == f"{tmp_path}/0"
    assert find_root(["b.jpg"], [str(tmp_path)]) == ("", ""), "and it ends"
    monkeypatch.setattr(where, "MOST_ENTRIES", 10)
    assert find_root(["a.jpg"], [str(tmp_path)]) == ("", ""), "eight texts and two folders are ten"
    monkeypatch.setattr(where, "MOST_ENTRIES", 20_000)
    monkeypatch.setattr(where, "MOST_SECONDS", -1.0)
    assert find_root(["a.jpg"], [str(tmp_path)]) == ("", "")
