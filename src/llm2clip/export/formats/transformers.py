"""--to transformers: the student alone, for AutoModel; its teacher stays beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.export.format import Format, Vectors

if TYPE_CHECKING:
    import torch

    from llm2clip.pipeline import LLM2CLIP

USE = """`trust_remote_code` runs the small files in this folder, `model.py`, `tower.py` and `adaptor.py`.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(".", trust_remote_code=True).eval()  # this folder
processor = AutoImageProcessor.from_pretrained(".")
pixels = processor(images=[Image.open("cat.jpg")], return_tensors="pt")["pixel_values"]
teacher_vectors = torch.randn(2, {{ teacher_dim }})  # of texts, from the teacher named below
with torch.inference_mode():
    image = torch.nn.functional.normalize(model.get_image_features(pixels), dim=-1)
    text = torch.nn.functional.normalize(model.get_text_features(teacher_vectors), dim=-1)
print(text @ image.T)
```

Texts go through the teacher first; `LLM2CLIP.from_pretrained(THIS_FOLDER, teacher=TEACHER)` of llm2clip does both and
checks that it is the right teacher."""


def write(model: LLM2CLIP, folder: Path) -> None:
    """Write the student, with the code that `AutoModel` needs, and how its images are prepared."""
    model.student.save_pretrained(folder)
    model.transform.save(folder)


def expect(model: LLM2CLIP) -> Vectors:
    """The model's vectors of the probe images and of random teacher vectors."""
    import torch
    from torch.nn.functional import normalize

    from llm2clip.export.check import probe_embeds, probe_images

    with torch.inference_mode():
        text = model.student.get_text_features(probe_embeds(model.student.config.teacher_dim).to(model.device))
    return {"text": normalize(text.float(), dim=-1).cpu().numpy(), "image": model.encode_image(probe_images())}


def reload(folder: Path, facts: dict[str, Any], device: torch.device, in_float32: bool) -> Vectors:
    """The same from the folder, in a fresh process without llm2clip."""
    from llm2clip.export.check import in_fresh_process

    return in_fresh_process(encode, folder, device=device, in_float32=in_float32, teacher_dim=facts["teacher_dim"])


def encode(folder: str, probes: Path, device: str, in_float32: bool) -> dict[str, Any]:
    """Image vectors, and text vectors of random teacher vectors; run by itself where llm2clip cannot be imported."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(device).eval()
    model = model.float() if in_float32 else model
    processor = AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(file) for file in sorted(probes.glob("*.png"))]
    pixels = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    embeds = torch.from_numpy(np.load(probes / "embeds.npy"))
    with torch.inference_mode():
        text = model.get_text_features(embeds.to(device))
        image = torch.cat([model.get_image_features(one.to(device)) for one in pixels])
    return {"text": text.float().cpu().numpy(), "image": image.float().cpu().numpy()}


FORMAT = Format(
    title="LLM2CLIP student",
    library="transformers",
    task="image-feature-extraction",
    contents="A vision tower (`{{ tower_class }}`) and an adaptor that takes its teacher's text vectors "
    "({{ teacher_dim }} numbers) to the same space: {{ space }}. It takes {{ images }}.",
    use=USE,
    write=write,
    expect=expect,
    reload=reload,
)
