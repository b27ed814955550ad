"""Hub datasets, with `load_dataset` answering from the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip.data.images import load_image
from llm2clip.data.source import Source
from llm2clip.errors import SourceError, UsageError

Open = Callable[..., Source]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jpeg: bytes) -> list[Any]:
    """A dataset with the splits train and test; returns the calls made."""
    calls: list[Any] = []
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})

    def fake(name: str, config: str | None, *, revision: str | None) -> Any:
        calls.append((name, config, revision))
        splits = {}
        for split in ("train", "test") if name == "org/name" else ("dev", "test"):
            images = [{"bytes": jpeg + bytes([i]), "path": "x.jpg"} for i in range(2)]
            rows = {"image": images, "caption": [f"{split} 0", f"{split} 1"]}
            datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / split))
            splits[split] = datasets.load_from_disk(str(tmp_path / split))
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    return calls


def test_a_split_is_read_from_the_cache(hub: list[Any], source_of: Open) -> None:
    samples = list(source_of("hf:org/name:test", revision="abc"))
    assert [sample.captions["raw"] for sample in samples] == [("test 0",), ("test 1",)]
    assert load_image(samples[0].image).size == (12, 8)
    assert hub == [("org/name", None, "abc")]


def test_train_is_taken_if_none_is_named(hub: list[Any], source_of: Open) -> None:
    assert next(iter(source_of("hf:org/name"))).captions == {"raw": ("train 0",)}
    with pytest.raises(UsageError, match="holds the splits dev, test; name one by split='NAME'"):
        source_of("hf:org/other")
    assert next(iter(source_of("hf:org/other", split="dev"))).captions == {"raw": ("dev 0",)}
    with pytest.raises(UsageError, match="has no split 'val'; it has train, test"):
        source_of("hf:org/name:val")


def test_a_config_may_stand_behind_the_name(hub: list[Any], source_of: Open) -> None:
    source_of("hf:org/name/small:train")
    assert hub == [("org/name", "small", None)]


def test_a_dataset_beside_a_file(hub: list[Any], source_of: Open, images_csv: Path) -> None:
    source = source_of("hf:org/name:test", images_csv)
    ids = [sample.id for sample in source]
    assert ids[0] == "org/name:test/00000/0"
    assert ids[2] == "captions/000.jpg"
    assert len(ids) == len(set(ids)) == 26


@pytest.mark.parametrize(
    ("error", "kind", "complaint"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist\non the Hub"),
            UsageError,
            "is not on the Hub",
        ),
        (ConnectionError("offline"), SourceError, "cannot be loaded: offline"),
        (
            ValueError("Config name is missing.\nPlease pick one"),
            SourceError,
            "cannot be loaded: Config name is missing. Pl",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), SourceError, "no longer supported"),
    ],
)
def test_what_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, source_of: Open, error: Exception, kind: type[Exception], complaint: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind) as caught:
        source_of("hf:org/name")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b/c/d", "hf:org/name:", "hf:org name"])
def test_what_is_no_id(source_of: Open, spec: str) -> None:
    with pytest.raises(UsageError, match="is no Hub dataset; write hf:org/name"):
        source_of(spec)
