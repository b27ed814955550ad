"""Images stay inside their table's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.data.bad import BadImage
from llm2clip.data.tables import Places


def inside(table: str | Path, name: str) -> str:
    return Places(str(table), allow_outside=False).resolve(name).path


def test_relative_to_the_table(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    assert inside(table, "a/b.jpg") == f"{tmp_path}/a/b.jpg"
    assert inside(table, "./x/../b.jpg") == f"{tmp_path}/b.jpg"
    assert inside(table, f"{tmp_path}/b.jpg") == f"{tmp_path}/b.jpg"


@pytest.mark.parametrize(
    "name", ["../b.jpg", "/etc/passwd", "a/../../b.jpg", "https://host/b.jpg", "file:///etc/passwd"]
)
def test_outside_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadImage) as caught:
        inside(tmp_path / "t.csv", name)
    assert caught.value.cause == "outside the table's folder"
    assert caught.value.detail == (
        f"{tmp_path}/t.csv: image {name!r} lies outside the table's folder; move it or add allow_outside=True"
    )


def test_a_sibling_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    with pytest.raises(BadImage):
        inside(tmp_path / "data" / "t.csv", "../data2/x.jpg")


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.jpg").touch()
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.jpg").symlink_to(tmp_path / "secret" / "x.jpg")
    (data / "folder").symlink_to(tmp_path / "secret")
    (data / "real.jpg").touch()
    (data / "within.jpg").symlink_to("real.jpg")
    for name in ("link.jpg", "folder/x.jpg"):
        with pytest.raises(BadImage, match="lies outside"):
            inside(data / "t.csv", name)
        assert Places(str(data / "t.csv"), allow_outside=True).resolve(name).path == f"{data}/{name}"
    assert inside(data / "t.csv", "within.jpg") == f"{data}/within.jpg"


def test_a_folder_reached_through_a_link_is_inside_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    assert inside(tmp_path / "alias" / "t.csv", "x.jpg") == f"{tmp_path}/alias/x.jpg"


def test_the_layout_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for blob, name in (("1", "t.csv"), ("2", "x.jpg")):
        (blobs / blob).touch()
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert inside(snapshot / "t.csv", "x.jpg") == f"{snapshot}/x.jpg"


def test_beside_a_table_behind_a_url() -> None:
    table = "https://host/data/t.csv"
    assert inside(table, "a/x.jpg") == "https://host/data/a/x.jpg"
    assert inside(table, "https://host/data/x.jpg") == "https://host/data/x.jpg"
    for name in ("../x.jpg", "/etc/passwd", "https://other/x.jpg", "https://host/data/../x.jpg", "../data2/x.jpg"):
        with pytest.raises(BadImage, match="lies outside"):
            inside(table, name)


def test_allowed_outside(tmp_path: Path) -> None:
    places = Places(str(tmp_path / "t.csv"), allow_outside=True)
    assert places.resolve("/images/x.jpg").path == "/images/x.jpg"
    assert places.resolve("https://host/x.jpg").path == "https://host/x.jpg"
