"""Is an exported folder the model it came from? Load it in a fresh process without llm2clip and compare vectors."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llm2clip.errors import LLM2CLIPError
from llm2clip.export import fresh

MIN_COSINE = 0.9999
"""Least cosine between a vector of the source and one of the exported folder."""
PICTURE_SIZES = ((320, 240), (200, 300), (64, 64), (97, 500))
"""Width and height of the probe pictures."""
PROBE_TEXTS = (
    "a dog",
    "A brown dog runs over a wet meadow; behind it stand two children in yellow raincoats.",
    "一只狗在草地上奔跑",
    "كلب يركض في الحقل",
    "A long description. " * 12 + "It ends here.",
)


def probe_pictures(seed: int = 0) -> list[Image.Image]:
    """Smooth random pictures of several shapes."""
    generator = np.random.default_rng(seed)
    coarse = [generator.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in PICTURE_SIZES]
    return [
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        for pixels, size in zip(coarse, PICTURE_SIZES, strict=True)
    ]


def probe_embeds(teacher_dim: int, seed: int = 0) -> torch.Tensor:
    """Random teacher vectors [4, T], float32."""
    return torch.randn(4, teacher_dim, generator=torch.Generator().manual_seed(seed))


def encode_fresh(
    kind: str, folder: Path, *, device: str | torch.device, teacher_dim: int, dtype: str = "auto"
) -> dict[str, np.ndarray]:
    """What a fresh process that cannot import llm2clip makes of the probes: `text` and `image` vectors.

    Args:
        dtype: "auto" computes in the dtype that the weights are saved in, "float32" in that.

    Raises:
        LLM2CLIPError: if it fails; with the last line it said.
    """
    with tempfile.TemporaryDirectory() as name:
        probes = Path(name)
        for i, picture in enumerate(probe_pictures()):
            picture.save(probes / f"{i}.png")
        (probes / "texts.txt").write_text("\n".join(PROBE_TEXTS), encoding="utf-8")
        np.save(probes / "embeds.npy", probe_embeds(teacher_dim).numpy())
        # the code file's text, not its path: its folder's modules would otherwise hide others of the same name
        source = Path(fresh.__file__).read_text(encoding="utf-8")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(probes / "modules")}
        result = subprocess.run(
            [sys.executable, "-c", source, kind, str(folder.resolve()), str(probes), str(device), dtype],
            env=environment,
            cwd=probes,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if result.returncode:
            said = [line.strip() for line in result.stderr.splitlines() if line.strip()] or ["nothing"]
            raise LLM2CLIPError(f"{folder} does not load in a fresh process: {said[-1]}")
        with np.load(probes / "vectors.npz") as vectors:
            return {name: vectors[name] for name in vectors.files}


def compare(folder: Path, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The least cosine of each sort of vector ("text", "image").

    Raises:
        LLM2CLIPError: if one is below `MIN_COSINE`.
    """
    least = {name: least_cosine(expected[name], found[name]) for name in expected}
    for name, cosine in least.items():
        if not cosine >= MIN_COSINE:
            raise LLM2CLIPError(
                f"{folder} gives other {name} vectors than the model it was made from: least cosine {cosine:.6f}, "
                f"at least {MIN_COSINE} is asked"
            )
    return least


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The least cosine between rows of `a` and `b` [N, D]; NaN counts as -1.

    >>> least_cosine(np.eye(2), np.array([[2.0, 0], [1, 1]])).__round__(4)
    0.7071
    """
    if a.shape != b.shape:
        return -1.0
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nan_to_num((a * b).sum(1) / lengths, nan=-1.0).min())
