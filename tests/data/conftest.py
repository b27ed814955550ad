"""Small images and tars, and a short way to read a source."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip.data.config import SourceConfig
from llm2clip.data.source import Source, open_source


def image(
    size: tuple[int, int] = (12, 8), colour: Any = (200, 30, 40), *, mode: str = "RGB", form: str = "JPEG"
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, form)
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | str], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def own_index_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2CLIP_INDEX_CACHE", str(tmp_path / ".indexes"))


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    return image()


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    return image


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., Path]:
    return write_tar


@pytest.fixture(scope="session")
def source_of() -> Callable[..., Source]:
    def open_it(*specs: str | Path, images: bool = True, **settings: Any) -> Source:
        config = SourceConfig(data=tuple(str(spec) for spec in specs), **{"max_bad_fraction": 1.0, **settings})
        return open_source(config, images=images)

    return open_it
