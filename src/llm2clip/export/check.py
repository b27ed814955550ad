"""Is an exported folder the model it came from? Load it in a fresh process without llm2clip and compare vectors."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llm2clip.errors import LLM2CLIPError

MIN_COSINE = 0.9999
"""Least cosine between a vector of the source and one of the exported folder."""
IMAGE_SIZES = ((320, 240), (200, 300), (64, 64), (97, 500))
"""Width and height of the probe images."""
PROBE_TEXTS = (
    "a dog",
    "A brown dog runs over a wet meadow; behind it stand two children in yellow raincoats.",
    "一只狗在草地上奔跑",
    "كلب يركض في الحقل",
    "A long description. " * 12 + "It ends here.",
)


def probe_images(seed: int = 0) -> list[Image.Image]:
    """Smooth random images of several shapes."""
    generator = np.random.default_rng(seed)
    coarse = [generator.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in IMAGE_SIZES]
    return [
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        for pixels, size in zip(coarse, IMAGE_SIZES, strict=True)
    ]


def probe_embeds(teacher_dim: int, seed: int = 0) -> torch.Tensor:
    """Random teacher vectors [4, T], float32."""
    return torch.randn(4, teacher_dim, generator=torch.Generator().manual_seed(seed))


HIDDEN = """
import sys
from pathlib import Path
from typing import Any
import numpy
sys.modules["llm2clip"] = None
"""
"""What comes before a function that runs by itself: a folder that needs llm2clip shall not pass."""


def in_fresh_process(
    encode: Callable[..., Any], folder: Path, *, device: torch.device | str, in_float32: bool, teacher_dim: int = 1
) -> dict[str, np.ndarray]:
    """What `encode` makes of the probes in a fresh process that cannot import llm2clip: `text` and `image` vectors.

    Args:
        encode: a function whose text stands by itself, imports included. It takes the folder, the folder of probes
            (`*.png`, `texts.txt` of a text a line, `embeds.npy`), the device and `in_float32`.
        folder: of the exported model.
        device: where to compute.
        in_float32: compute so, whatever the weights are saved in.
        teacher_dim: T of the random teacher vectors [4, T].

    Raises:
        LLM2CLIPError: if it fails; with the last line it said.
    """
    with tempfile.TemporaryDirectory() as name:
        probes = Path(name)
        for i, image in enumerate(probe_images()):
            image.save(probes / f"{i}.png")
        (probes / "texts.txt").write_text("\n".join(PROBE_TEXTS), encoding="utf-8")
        np.save(probes / "embeds.npy", probe_embeds(teacher_dim).numpy())
        call = f"{encode.__name__}(sys.argv[1], Path(sys.argv[2]), sys.argv[3], {in_float32})"
        source = f"{HIDDEN}\n{inspect.getsource(encode)}\nnumpy.savez(Path(sys.argv[2], 'vectors.npz'), **{call})"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(probes / "modules")}
        result = subprocess.run(
            [sys.executable, "-c", source, str(folder.resolve()), str(probes), str(device)],
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
