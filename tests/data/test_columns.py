"""Which columns are recognised, and what in them is a caption."""

from __future__ import annotations

from typing import Any

import pytest

from llm2clip.data.bad import BadSamples
from llm2clip.data.columns import Layout, find_layout, read_captions, require
from llm2clip.errors import UsageError


def usual(*columns: str) -> Layout:
    return find_layout(columns, captions={}, image=None)


@pytest.mark.parametrize(
    "column",
    [*"image filepath file_name filename path image_path img jpg png image Image IMAGE_PATH".split(), "Image Path"],
)
def test_usual_image_columns(column: str) -> None:
    assert usual("url", column, "caption").image == column


def test_the_likelier_image_column_wins() -> None:
    assert usual("path", "file_name", "image").image == "image"


@pytest.mark.parametrize(
    ("columns", "captions"),
    [
        (["caption"], {"raw": ("caption",)}),
        (["text"], {"raw": ("text",)}),
        (["txt"], {"raw": ("txt",)}),
        (["title", "caption"], {"raw": ("caption",)}),
        (["txt", "caption"], {"raw": ("txt", "caption")}),
        (["short_caption", "long_caption"], {"short": ("short_caption",), "long": ("long_caption",)}),
        (["short", "long"], {"short": ("short",), "long": ("long",)}),
        (["shortSV_captions", "longSV_captions"], {"short": ("shortSV_captions",), "long": ("longSV_captions",)}),
        (["shortIB_captions", "shortSV_captions"], {"short": ("shortSV_captions",)}),
        (["longIB_captions"], {"long": ("longIB_captions",)}),
        (["raw_caption", "dense_caption"], {"raw": ("raw_caption",), "long": ("dense_caption",)}),
        (["caption_zh", "en_caption", "zh"], {"zh": ("caption_zh",), "en": ("en_caption",)}),
        (["caption_0", "caption_1", "caption_2"], {"raw": ("caption_0", "caption_1", "caption_2")}),
        (
            ["caption1", "short_caption_1", "short_caption_2"],
            {"raw": ("caption1",), "short": ("short_caption_1", "short_caption_2")},
        ),
        (["caption_id", "caption_length", "id", "width", "caption_score"], {}),
    ],
)
def test_usual_caption_columns(columns: list[str], captions: dict[str, Any]) -> None:
    assert usual("image", *columns).captions == captions


def test_named_columns_replace_the_usual_ones() -> None:
    layout = find_layout(["img", "a", "b", "caption"], captions={"short": "a", "raw": "a, b"}, image="img")
    assert layout == Layout("img", {"short": ("a",), "raw": ("a", "b")})
    assert layout.columns == ("a", "b", "img")


def test_a_column_whose_name_has_a_comma() -> None:
    assert find_layout(["i", "a,b"], captions={"raw": "a,b"}, image="i").captions == {"raw": ("a,b",)}


def test_missing_columns_are_told_with_those_there_are() -> None:
    columns = ["image", "short_caption"]

    def complaint(captions: dict[str, str], image: str | None, names: list[str] = columns) -> str:
        layout = find_layout(names, captions=captions, image=image)
        with pytest.raises(UsageError) as caught:
            require(layout, names, "a.csv", captions=captions, image=image, needs_image=True)
        return str(caught.value)

    assert complaint({"short": "short_captoin"}, None) == (
        "a.csv has no column 'short_captoin' (captions={'short': 'short_captoin'}); did you mean 'short_caption'?; "
        "its columns are image, short_caption"
    )
    assert complaint({}, "img") == (
        "a.csv has no column 'img' (image='img'); did you mean 'image'?; its columns are image, short_caption"
    )
    assert complaint({}, None, ["a", "caption"]) == (
        "a.csv has no column that looks like images; give image='COLUMN'; its columns are a, caption"
    )
    assert complaint({}, None, ["image", "b"]) == (
        "a.csv has no column that looks like captions; give captions={'KIND': 'COLUMN'}; its columns are image, b"
    )


def test_captions_are_stripped_once_each_and_counted_when_unusable() -> None:
    bad = BadSamples(1.0)
    layout = Layout("image", {"raw": ("a", "b"), "long": ("c",), "zh": ("d",)})
    values = {"a": ["  一只狗 🐕\n", "x", "", 3, None], "b": "x", "c": "   ", "d": "كلب"}
    assert read_captions(values, layout, sample_id="s", bad=bad) == {"raw": ("一只狗 🐕", "x"), "zh": ("كلب",)}
    assert bad.counts == {"empty caption": 2, "caption not text": 1}
    assert bad.num_bad == 0


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (7, "caption not text"),
        (True, "caption not text"),
        ({"en": "a"}, "caption not text"),
        ("", "empty caption"),
        ("a\udce9", "caption not UTF-8"),
        (b"a\xe9", "caption not UTF-8"),
        (None, None),
        (float("nan"), None),
        ([], None),
    ],
)
def test_what_is_no_caption(value: Any, cause: str | None) -> None:
    bad = BadSamples(1.0)
    assert read_captions({"a": value}, Layout(None, {"raw": ("a",)}), sample_id="s", bad=bad) == {}
    assert bad.counts == ({cause: 1} if cause else {})


def test_bytes_that_are_utf_8_are_text() -> None:
    layout = Layout(None, {"raw": ("a",)})
    assert read_captions({"a": "é".encode()}, layout, sample_id="s", bad=BadSamples(1.0)) == {"raw": ("é",)}
