"""What the page shows of a dataset: ranks, misses and confused pairs by hand; thumbnails; the same by the seed."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.data.sample import ImageRef, Sample
from llm2clip.eval.gallery import Query, choose, find_queries, gallery, thumbnail


class Angles:
    """Images stand at 0, 40, 80 and 120 degrees; a caption stands where its number says."""

    def images(self, samples: list[Sample]) -> tuple[list[int], torch.Tensor]:
        readable = [i for i, one in enumerate(samples) if one.id != "unreadable"]
        return readable, torch.stack([self.at(40.0 * int(samples[i].id)) for i in readable])

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.at(float(text)) for text in texts])

    def at(self, degrees: float) -> torch.Tensor:
        return torch.tensor([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], dtype=torch.float32)


def sample(name: str, *texts: str, path: str = "", kind: str = "short") -> Sample:
    return Sample(name, ImageRef(path or name), {kind: texts})


SAMPLES = [
    sample("unreadable", "0"),
    sample("0", "1"),  # right
    sample("1", "79", "81", "42"),  # the first two lie at image 2
    sample("2", "41"),  # at image 1
    sample("3", "1"),  # at image 0: its own image is the last of four
]


def cosine(degrees: float) -> float:
    return float(np.cos(np.radians(degrees)))


def test_what_captions_find_by_hand() -> None:
    found = find_queries(SAMPLES, Angles(), seed=0)
    assert [(query.text, query.owner, query.rank, query.best) for query in found] == [
        ("1", 1, 1, (1, 2, 3, 4)),
        ("79", 2, 2, (3, 2, 4, 1)),
        ("81", 2, 3, (3, 4, 2, 1)),
        ("42", 2, 1, (2, 3, 1, 4)),
        ("41", 3, 2, (2, 3, 1, 4)),
        ("1", 4, 4, (1, 2, 3, 4)),
    ]
    assert {query.pool for query in found} == {4}
    margins = [cosine(39) - 1, cosine(1) - cosine(39), cosine(1) - cosine(41)]
    margins[0] = cosine(39) - cosine(1)
    assert [query.margin for query in found[:3]] == pytest.approx(margins, abs=1e-5)


def test_what_is_chosen_by_hand() -> None:
    chosen = choose(find_queries(SAMPLES, Angles(), seed=0), seed=0, most=12)
    assert [query.text for query in chosen["misses"]] == ["1", "81", "41"]  # "79" is of the same image as "81"
    # images 1 and 2 (samples 2 and 3) are taken for each other by three captions, of which "81" is the clearest
    assert [(query.text, {query.owner, query.wrong}) for query in chosen["confused"]] == [("81", {2, 3}), ("1", {4, 1})]
    drawn = [query.owner for query in chosen["drawn"]]
    assert sorted(drawn) == [1, 2, 3, 4]
    assert [len(part) for part in choose(find_queries(SAMPLES, Angles(), seed=0), seed=0, most=4).values()] == [2, 1, 1]


def test_the_seed_draws() -> None:
    queries = [Query("short", str(i), i, 1, 100, (i,), -1.0) for i in range(100)]
    first, again, other = (choose(queries, seed=seed, most=10)["drawn"] for seed in (0, 0, 1))
    assert first == again != other and len(first) == 5


def test_a_kind_has_its_own_pool() -> None:
    samples = [sample("0", "1"), sample("1", "2", kind="long"), sample("2", "3", kind="long")]
    found = find_queries(samples, Angles(), seed=0)
    assert [(query.kind, query.pool, query.best) for query in found] == [
        ("short", 1, (0,)),
        ("long", 2, (1, 2)),
        ("long", 2, (1, 2)),
    ]


def test_images_are_small_jpegs_in_the_page(tmp_path: Path) -> None:
    Image.new("RGB", (640, 320), "red").save(tmp_path / "0.png")
    samples = [sample(str(i), str(40 * i), path=str(tmp_path / f"{i}.png")) for i in range(2)]  # 1.png is gone
    parts = gallery(samples, Angles(), seed=0, most=4)
    head, _, data = thumbnail(samples[0]).partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and image.format == "JPEG" and image.size == (160, 80)
    assert image.getpixel((80, 40))[0] > 200 > 60 > image.getpixel((80, 40))[1]
    shown = {query["text"]: query["best"] for query in parts["drawn"]}
    assert shown["0"][0] == {"image": thumbnail(samples[0]), "right": True} and shown["0"][1]["image"] == ""
    long = [sample("0", "1." + 400 * "0")]
    assert len(gallery(long, Angles(), seed=0, most=4)["drawn"][0]["text"]) == 283
