"""Make the mini models that ship with the package: `python -m demo.make_models FOLDER {llm,clip}`.

Both see only their own scenes: the LLM those of the split "text" (as text), the CLIP those of "clip" (short English
captions of the restricted vocabulary). Weights are saved in bfloat16, in files below 1.4 MB.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from demo.clip import MEAN, STD, ClipTraining, Pairs, new_clip, train_clip
from demo.images import SIDE, draw_image
from demo.llm import Pretraining, new_llm, pretrain
from demo.tokens import make_tokenizer
from demo.write import captioned
from llm2clip.artifacts import write_json
from llm2clip.errors import UsageError

LLM = Pretraining(steps=2800)
CLIP = ClipTraining(steps=1200)
CLIP_IMAGES = 60_000
LARGE_LLM = Pretraining(
    steps=20_000, width=640, layers=12, heads=10, inner=1728, batch_size=128, muon_rate=0.01, adam_rate=2e-3
)
"""Some 60 million parameters, 400 million tokens: for a GPU, or a patient CPU."""
LARGE_CLIP = ClipTraining(steps=6000, batch_size=512)
LARGE_IMAGES = 400_000
SHARD = "1400KB"


def make_llm(folder: Path, how: Pretraining = LLM) -> Path:
    """Pretrain the mini LLM and save it as a transformers folder."""
    start = time.monotonic()
    tokenizer = make_tokenizer()
    model = new_llm(len(tokenizer), how)
    log = pretrain(model, tokenizer, how, device="cuda" if torch.cuda.is_available() else "cpu")
    model.to("cpu", torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    _write_origin(folder, start, {"how": vars(how), "tokens": how.steps * how.batch_size * how.length, "log": log})
    return folder


def make_clip(folder: Path, how: ClipTraining = CLIP, *, images: int = CLIP_IMAGES) -> Path:
    """Pretrain the mini CLIP and save it as a transformers folder with tokenizer and image processor."""
    from transformers import CLIPImageProcessor

    start = time.monotonic()
    tokenizer = make_tokenizer(closing=True)
    model = new_clip(len(tokenizer), seed=how.seed)
    pairs = clip_pairs(images, tokenizer, seed=how.seed)
    log = train_clip(model, pairs, how, mix={"short": 1.0}, description="mini CLIP")
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.model_max_length = how.context
    tokenizer.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=square, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(folder)
    _write_origin(folder, start, {"how": vars(how), "images": images, "log": log})
    return folder


def clip_pairs(count: int, tokenizer: Any, *, seed: int) -> Pairs:
    """Images of the split "clip" with short English captions of the restricted vocabulary."""
    import numpy as np

    pixels, captions = torch.empty((count, 3, SIDE, SIDE), dtype=torch.uint8), []
    for index, sample in enumerate(captioned("clip", count, seed=seed, kinds=("short",))):
        image = draw_image(sample.scene, seed=sample.seed)
        pixels[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        captions.append({"short": tokenizer(sample.captions["short"])["input_ids"]})
    return Pairs(pixels=pixels, captions=captions)


def _write_origin(folder: Path, start: float, facts: dict[str, Any]) -> None:
    """Note beside the weights how they came about."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    took = {"wall_seconds": round(time.monotonic() - start), "cpu_seconds": round(time.process_time())}
    write_json(folder / "origin.json", {**facts, "machine": machine, "torch": torch.__version__, **took})


def main(arguments: list[str]) -> None:
    """Make one of the two models in the folder named first."""
    if len(arguments) != 2 or arguments[1] not in ("llm", "clip"):
        raise UsageError("write python -m demo.make_models FOLDER {llm,clip}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    target = Path(arguments[0]) / arguments[1]
    if arguments[1] == "llm":
        make_llm(target)
    else:
        make_clip(target)


if __name__ == "__main__":
    main(sys.argv[1:])
