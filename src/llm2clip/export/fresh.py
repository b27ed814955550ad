"""Run by itself, in a fresh process: load an exported folder as its user will, and encode the probes.

Arguments: the kind of folder, the folder, the folder of probes, the device, and "auto" (as saved) or "float32".
Imports nothing of llm2clip, and hides it, so that a folder that needs it does not pass.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np


def encode_bundle(folder: str, probes: Path, device: str, dtype: str) -> dict[str, Any]:
    """Text and picture vectors of a folder for sentence-transformers."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, trust_remote_code=True, device=device)
    model = model.float() if dtype == "float32" else model
    texts = (probes / "texts.txt").read_text(encoding="utf-8").split("\n")
    pictures = [Image.open(file) for file in sorted(probes.glob("*.png"))]
    return {"text": model.encode(texts), "image": model.encode(pictures)}


def encode_model(folder: str, probes: Path, device: str, dtype: str) -> dict[str, Any]:
    """Picture vectors, and text vectors of random teacher vectors, of a folder for transformers."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(device).eval()
    model = model.float() if dtype == "float32" else model
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.open(file) for file in sorted(probes.glob("*.png"))]
    pixels = [processor(images=picture, return_tensors="pt")["pixel_values"] for picture in pictures]
    embeds = torch.from_numpy(np.load(probes / "embeds.npy"))
    with torch.inference_mode():
        text = model.get_text_features(embeds.to(device))
        image = torch.cat([model.get_image_features(one.to(device)) for one in pixels])
    return {"text": text.float().cpu().numpy(), "image": image.float().cpu().numpy()}


ENCODE = {"sentence-transformers": encode_bundle, "transformers": encode_model}

if __name__ == "__main__":
    sys.modules["llm2clip"] = None  # type: ignore[assignment]
    kind, exported, place, where, number = sys.argv[1:6]
    np.savez(Path(place) / "vectors.npz", **ENCODE[kind](exported, Path(place), where, number))
