"""--to sentence-transformers: one folder that encodes texts and images, the teacher in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.export.format import Format, Vectors

if TYPE_CHECKING:
    import torch

    from llm2clip.pipeline import LLM2CLIP

USE = """`trust_remote_code` runs the small `.py` files in this folder, which are llm2clip's.

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".", trust_remote_code=True)  # this folder
text = model.encode(["a grey cat on a sofa", "two dogs on a beach"])
image = model.encode([Image.open("cat.jpg")])
print(model.similarity(text, image))
```

With llm2clip installed, without running any code of this folder:

```python
from llm2clip import LLM2CLIP

model = LLM2CLIP.from_pretrained(".")  # this folder
text = model.encode_text(["a grey cat on a sofa", "two dogs on a beach"])
image = model.encode_image(["cat.jpg"])
print(text @ image.T)
```

In sentence-transformers a text that ends like an image's file name (`.jpg`) is taken for an image."""


def write(model: LLM2CLIP, folder: Path) -> None:
    """Write student and teacher as one bundle."""
    from llm2clip.bundle import save_bundle

    assert model.teacher is not None
    save_bundle(folder, model.student, model.transform, model.teacher, prompt=model.prompt)


def expect(model: LLM2CLIP) -> Vectors:
    """The model's vectors of the probe texts and images."""
    from llm2clip.export.check import PROBE_TEXTS, probe_images

    texts = model.encode_text(PROBE_TEXTS)
    return {"text": texts, "query": texts, "document": texts, "image": model.encode_image(probe_images())}


def reload(folder: Path, facts: dict[str, Any], device: torch.device, in_float32: bool) -> Vectors:
    """The same from the folder, in a fresh process without llm2clip."""
    from llm2clip.export.check import in_fresh_process

    return in_fresh_process(encode, folder, device=device, in_float32=in_float32)


def encode(folder: str, probes: Path, device: str, in_float32: bool) -> dict[str, Any]:
    """Text vectors, by each call there is, and image vectors of the probes; run where llm2clip cannot be imported."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, trust_remote_code=True, device=device)
    model = model.float() if in_float32 else model
    texts = (probes / "texts.txt").read_text(encoding="utf-8").split("\n")
    images = [Image.open(file) for file in sorted(probes.glob("*.png"))]
    found = {"text": model.encode(texts), "query": model.encode_query(texts), "document": model.encode_document(texts)}
    return {**found, "image": model.encode(images)}


FORMAT = Format(
    title="LLM2CLIP: texts and images in one space",
    library="sentence-transformers",
    task="sentence-similarity",
    contents="Encodes texts of any length the teacher reads, and {{ images }}, as {{ space }}.",
    use=USE,
    write=write,
    expect=expect,
    reload=reload,
    needs_teacher=True,
)
