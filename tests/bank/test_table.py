"""Tables joined: which samples are one image, in blocks of any size."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.bank import reader as module
from llm2clip.bank.collect import Intake, collect
from llm2clip.bank.merge import image_hashes, image_index, joined, with_captions
from llm2clip.bank.reader import Table, read_arrow
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import ImageRef, Sample

TAR, CELL = ImageRef("/0.tar", 512, 100), ImageRef("/t.parquet", 3, -1, "image")
OTHERS = {
    "another path": (TAR, ImageRef("/1.tar", 512, 100)),
    "another place in a tar": (TAR, ImageRef("/0.tar", 1024, 100)),
    "another length": (TAR, ImageRef("/0.tar", 512, 101)),
    "another row of a table": (CELL, ImageRef("/t.parquet", 4, -1, "image")),
    "another column": (CELL, ImageRef("/t.parquet", 3, -1, "thumbnail")),
}


def table_of(folder: Path, samples: list[Sample]) -> Table:
    folder.mkdir()
    collect(Intake(samples, "source", BadSamples(1.0)), folder)
    return Table(folder)


def named(name: str, image: ImageRef, **captions: tuple[str, ...]) -> Sample:
    return Sample(name, image, captions or {"raw": (name,)})


@pytest.mark.parametrize("other", OTHERS)
def test_images_that_lie_elsewhere_are_two(other: str, tmp_path: Path) -> None:
    one, two = OTHERS[other]
    tables = [table_of(tmp_path / "a", [named("a", one)]), table_of(tmp_path / "b", [named("b", two)])]
    assert [sample.id for sample in joined(tables)] == ["a", "b"]


@pytest.mark.parametrize("image", [TAR, CELL])
def test_captions_of_one_image_are_gathered_in_its_first_sample(image: ImageRef, tmp_path: Path) -> None:
    tables = [
        table_of(tmp_path / "a", [named("a", image, short=("a disc",))]),
        table_of(tmp_path / "b", [named("b", image, short=("one disc", "a disc"), zh=("圆",))]),
        table_of(tmp_path / "c", [named("c", image, zh=("圆", "一个圆"))]),
    ]
    expected = Sample("a", image, {"short": ("a disc", "one disc"), "zh": ("圆", "一个圆")})
    assert list(joined(tables)) == [expected]
    assert with_captions(tables[0].sample(0), tables[0].sample(0)) == tables[0].sample(0)


@pytest.mark.parametrize("rows", [1, 3, 65536])
def test_blocks_make_no_difference(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tables of ten images that overlap: 0..9, 5..14 and 8..17, each with captions of its own."""
    monkeypatch.setattr(module, "BLOCK_ROWS", rows)
    tables = []
    for name, first in (("a", 0), ("b", 5), ("c", 8)):
        samples = [
            named(f"{name}{i}", ImageRef("/0.tar", 512 * i, 9), **{name: (f"{name} {i}",)})
            for i in range(first, first + 10)
        ]
        tables.append(table_of(tmp_path / name, samples))
    found = list(joined(tables))
    assert [sample.id for sample in found] == [
        *(f"a{i}" for i in range(10)),
        *(f"b{i}" for i in range(10, 15)),
        *(f"c{i}" for i in range(15, 18)),
    ]
    for i, sample in enumerate(found):
        kinds = [name for name, first in (("a", 0), ("b", 5), ("c", 8)) if first <= i < first + 10]
        assert sample.captions == {kind: (f"{kind} {i}",) for kind in kinds}
    blocks = list(tables[0].iter_texts())
    assert [text for texts, _ in blocks for text in texts] == [f"a {i}".encode() for i in range(10)]
    assert [len(hashes) for _, hashes in blocks] == [len(texts) for texts, _ in blocks]


@pytest.mark.parametrize("rows", [2, 4, 65536])
def test_of_a_image_that_comes_twice_in_a_table_the_first_counts(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", rows)
    places = [ImageRef("/0.tar", i) for i in (0, 1, 2, 3, 0)]
    twice = table_of(tmp_path / "b", [named(f"b{n}", place) for n, place in enumerate(places)])
    hashes = image_hashes(twice, range(5))
    assert image_index(twice).lookup(hashes).tolist() == [0, 1, 2, 3, 0]
    first = table_of(tmp_path / "a", [named("a", places[1])])
    assert [(s.id, s.captions["raw"]) for s in joined([first, twice])] == [
        ("a", ("a", "b1")),
        *((f"b{n}", (f"b{n}",)) for n in (0, 2, 3, 4)),
    ]


def test_bytes_of_a_sample_and_of_a_caption(tmp_path: Path) -> None:
    """As `docs/bank-format.md` says: 38 a sample beside its id, 9 a caption beside its text."""

    def size(name: str, samples: list[Sample]) -> int:
        """Bytes of the columns of samples and captions."""
        table = table_of(tmp_path / name, samples)
        return read_arrow(table.folder, "samples").nbytes - sum(len(sample.id) for sample in samples)

    few, more, captions = (
        [named(str(i), TAR, raw=("a", "b")[:each]) for i in range(count)] for count, each in ((1, 1), (11, 1), (11, 2))
    )
    assert (size("more", more) - size("few", few)) / 10 == 38 + 9
    assert (size("captions", captions) - size("more again", more)) / 11 == 9


def test_bytes_of_a_distinct_caption_in_memory() -> None:
    """As `docs/bank-format.md` says: 32."""
    import numpy as np

    from llm2clip.bank.hashes import HashIndex

    index = HashIndex()
    index.insert(np.random.default_rng(0).integers(0, 256, (1000, 16)).astype(np.uint8), np.arange(1000))
    assert sum(array.nbytes for run in index._runs for array in run) <= 32 * 1000
