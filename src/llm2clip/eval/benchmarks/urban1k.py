"""Urban1k: 1,000 busy street scenes with captions of about a hundred words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llm2clip.errors import SourceError
from llm2clip.eval.annotations import Row, parsed, row
from llm2clip.eval.card import Card
from llm2clip.eval.places import Place

CARD = Card(
    title="Urban1k, long captions of street scenes",
    split="all",
    per_image="1 an image",
    text="the first line of each file alone, as Long-CLIP's code reads it, without the blanks around it",
    source="Long-CLIP (arXiv 2403.15378), its protocol in code",
    licence="not found",
    fetch=(
        "Urban1k.zip as it is, or unpacked: image/N.jpg and caption/N.txt, N from 1 to 1000 (hf BeichenZhang/Urban1k)",
        "or FLAIR's annotations.json beside the images",
    ),
    folders=("image", "Urban1k/image", "images"),
    images=1000,
    captions=1000,
    notes=("near its ceiling: 97 is printed", "Urban-200 is another, older set"),
)


def read(place: Place) -> Iterable[Row]:
    """The rows."""
    if texts := place.texts("caption"):
        return _files(place, {name: text.lines() for name, text in texts.items()})
    if text := place.text("annotations.json", "annotations/annotations.json"):
        rows = parsed(text)
        rows = rows.get("annotations") if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            raise SourceError(f"{text.name} holds no annotations; fetch it again")
        return (row(one.get("image"), one.get("caption"), f"{text.name} row {i}") for i, one in enumerate(rows, 1))
    raise place.absent()


def _files(place: Place, texts: dict[str, list[str]]) -> Iterator[Row]:
    """A row a file, in the order of their numbers; the lines after the first are left out, and it is said how often."""
    expected = {str(number) for number in range(1, 1001)}
    if odd := sorted(texts.keys() ^ expected, key=lambda name: (len(name), name)):
        what = "is missing" if odd[0] in expected else "is none of 1.txt to 1000.txt"
        raise SourceError(f"urban1k: caption/{odd[0]}.txt {what}")
    if longer := sum(any(line.strip() for line in lines[1:]) for lines in texts.values()):
        place.note(f"{longer:,} of {len(texts):,} files have more than one line; only the first counts")
    for name in sorted(texts, key=int):
        yield row(f"{name}.jpg", (texts[name] or [""])[0], f"caption/{name}.txt")
