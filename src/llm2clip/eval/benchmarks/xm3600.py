"""Crossmodal-3600: images from all over the world, captioned in 36 languages; all captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from llm2clip.errors import SourceError
from llm2clip.eval.annotations import Row, joined, objects, row, table
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place
from llm2clip.eval.writing import check_language

COUNTS = dict(
    pair.split("=")
    for pair in "ar=7367 bn=3600 cs=7207 da=7264 de=8643 el=7204 en=7200 es=8614 fa=7245 fi=7127 fil=7109 fr=8562 "
    "he=7200 hi=8503 hr=7280 hu=7216 id=7126 it=8471 ja=7185 ko=7650 mi=4732 nl=8059 no=7213 pl=7141 pt=7243 quz=7200 "
    "ro=7123 ru=7200 sv=7273 sw=7046 te=7200 th=7200 tr=7233 uk=7215 vi=7350 zh=7174".split()
)
CARD = Card(
    title="Crossmodal-3600, 36 languages, all captions",
    split="all",
    per_image="1 to 4 an image and language, all count",
    source="google.github.io/crossmodal-3600; the protocol of MetaCLIP 2 and mteb",
    licence="captions CC BY 4.0; images CC BY 2.0",
    fetch=(
        "captions.zip as it is or its captions.jsonl (google.github.io/crossmodal-3600)",
        "and images.tgz unpacked to images/ (open-images-dataset.s3.amazonaws.com/crossmodal-3600)",
        "or the Parquet files of hf floschne/xm3600, data/<language>-*.parquet",
    ),
    folders=("images",),
    downloads=(
        "https://google.github.io/crossmodal-3600/web-data/captions.zip",
        "https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz",
    ),
    images=3600,
    captions={language: int(count) for language, count in COUNTS.items()},
    notes=(
        "compare text to image: more captions raise image to text, not text to image",
        "CLIP_benchmark and those who use it keep the first caption: xm3600-first. The paper does not say which it "
        "took; its image to text above its text to image looks like all.",
        "Quechua and Maori are near 0 for everyone",
    ),
)


def read(place: Place) -> Iterable[Row]:
    """The rows, each with its captions in all languages."""
    if text := place.text("captions.jsonl"):
        rows = joined(
            row(f"{one.get('image/key')}.jpg", _captions(one, language, where), where, language)
            for where, one in objects(text)
            for language in COUNTS
        )
        return _checked(list(rows), text.name)
    found = {language: place.paths(f"data/{language}-*.parquet", f"{language}-*.parquet") for language in COUNTS}
    if missing := [language for language, paths in found.items() if not paths]:
        raise place.absent(f"captions.jsonl, and {missing[0]}-*.parquet" if len(missing) < len(found) else "")
    return _checked(list(_of_parquet(found)), "the Parquet files")


def _checked(rows: list[Row], where: str) -> list[Row]:
    """The rows, if each language is what it is called."""
    for language in COUNTS:
        check_language([text for one in rows for text in one.captions[language]], language, where)
    return rows


def _captions(one: dict[str, object], language: str, where: str) -> object:
    cell = one.get(language)
    if not isinstance(cell, dict) or not isinstance(cell.get("caption"), list):
        raise SourceError(f"{where} has no captions in {language!r}; fetch the file again")
    return cell["caption"]


def _of_parquet(found: dict[str, list[Path]]) -> Iterator[Row]:
    """A table a language, each with all images; those of the first are taken."""
    first: dict[str, Row] = {}
    rows: dict[str, dict[str, tuple[str, ...]]] = {}
    for language, paths in found.items():
        for path in paths:
            with_images = zip(table(path, "image", "captions"), table(path, "image_id", "captions"), strict=True)
            for one, named in with_images:
                first.setdefault(str(named.image), one)
                rows.setdefault(str(named.image), {})[language] = one.captions[""]
    for name, captions in rows.items():
        yield Row(first[name].image, captions, first[name].where)
