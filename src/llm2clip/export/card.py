"""The model card of an exported folder: what it is, where it comes from, code that runs, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from llm2clip.artifacts import read_json
from llm2clip.errors import ArtifactError, UsageError, setting
from llm2clip.export.tower import load_options

TITLES = {
    "sentence-transformers": "LLM2CLIP: texts and pictures in one space",
    "transformers": "LLM2CLIP student",
    "tower": "Vision tower trained with LLM2CLIP",
}
UPRIGHT = (
    "Photographs that a camera marked as turned (EXIF) go in upright: `PIL.ImageOps.exif_transpose(Image.open(...))`. "
    "llm2clip does that itself."
)
TAGS = ["llm2clip", "image-text-retrieval", "clip"]


def write_card(folder: Path, facts: dict[str, Any], *, scores: dict[str, float] | None) -> None:
    """Write `folder/README.md`.

    Args:
        facts: as in the manifest.
        scores: metric name to fraction, from a report; None leaves the section out.
    """
    kind = facts["to"]
    sections = [
        front_matter(kind),
        f"# {TITLES[kind]}",
        summary(facts),
        f"## Use\n\n{USE[kind](facts)}\n\n{UPRIGHT}",
        f"## Made from\n\n{origin_table(facts)}",
    ]
    if scores:
        sections.append(f"## Scores\n\n{score_table(scores)}")
    sections.append(
        "Method: [LLM2CLIP](https://arxiv.org/abs/2411.04997), a large language model teaches a vision tower through "
        "its vectors of captions. The licences of the tower, the teacher and the pictures apply."
    )
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def read_scores(report: Path) -> dict[str, float]:
    """The metrics of a `report.json`.

    Raises:
        UsageError: if it is no report.
    """
    if not report.is_file():
        raise UsageError(f"{setting('report')} {report} is no file; give the report.json that evaluate wrote")
    try:
        data = read_json(report)
    except ArtifactError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("metrics"), dict):
        raise UsageError(f"{setting('report')} {report} holds no metrics; give the report.json that evaluate wrote")
    return dict(data["metrics"])


def front_matter(kind: str) -> str:
    """The card's YAML head."""
    library = "sentence-transformers" if kind == "sentence-transformers" else "transformers"
    task = "sentence-similarity" if kind == "sentence-transformers" else "image-feature-extraction"
    tags = "".join(f"\n- {tag}" for tag in TAGS)
    return f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:{tags}\n---"


def summary(facts: dict[str, Any]) -> str:
    """What the folder holds, in a paragraph."""
    height, width = facts["image_size"]
    pictures = f"pictures of {width} x {height} px, prepared as `preprocessor_config.json` says"
    if facts["to"] == "tower":
        return f"A `{facts['tower_class']}` for {pictures}; its pooled vectors have {facts['tower_dim']} numbers."
    space = f"vectors of {facts['dim']} numbers, compared by cosine"
    if facts["to"] == "transformers":
        return (
            f"A vision tower (`{facts['tower_class']}`) and an adaptor that takes its teacher's text vectors "
            f"({facts['teacher_dim']} numbers) to the same space: {space}. It takes {pictures}."
        )
    return f"Encodes texts of any length the teacher reads, and {pictures}, as {space}."


def use_bundle(facts: dict[str, Any]) -> str:
    """How to encode with sentence-transformers and with llm2clip."""
    return """`trust_remote_code` runs the small `.py` files in this folder, which are llm2clip's.

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

In sentence-transformers a text that ends like a picture's file name (`.jpg`) is taken for a picture."""


def use_model(facts: dict[str, Any]) -> str:
    """How to encode pictures with transformers, and texts with the teacher."""
    return f"""`trust_remote_code` runs the small files in this folder, `model.py`, `tower.py` and `adaptor.py`.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(".", trust_remote_code=True).eval()  # this folder
processor = AutoImageProcessor.from_pretrained(".")
pixels = processor(images=[Image.open("cat.jpg")], return_tensors="pt")["pixel_values"]
teacher_vectors = torch.randn(2, {facts["teacher_dim"]})  # of texts, from the teacher named below
with torch.inference_mode():
    image = torch.nn.functional.normalize(model.get_image_features(pixels), dim=-1)
    text = torch.nn.functional.normalize(model.get_text_features(teacher_vectors), dim=-1)
print(text @ image.T)
```

Texts go through the teacher first; `LLM2CLIP.from_pretrained(THIS_FOLDER, teacher=TEACHER)` of llm2clip does both and
checks that it is the right teacher."""


def use_tower(facts: dict[str, Any]) -> str:
    """How to load the tower by its own class."""
    tower_class = getattr(transformers, facts["tower_class"])
    options = "".join(f", {name}={value}" for name, value in load_options(tower_class, facts["pooling"]).items())
    return f"""```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, {facts["tower_class"]}

tower = {facts["tower_class"]}.from_pretrained("."{options}).eval()  # this folder
processor = AutoImageProcessor.from_pretrained(".")
pixels = processor(images=[Image.open("cat.jpg")], return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    print(tower(pixel_values=pixels).last_hidden_state.shape)
```

It takes the place of the tower it was trained from, for example as the vision tower of a LLaVA."""


USE = {"sentence-transformers": use_bundle, "transformers": use_model, "tower": use_tower}


def origin_table(facts: dict[str, Any]) -> str:
    """Tower, teacher, bank and steps, as far as the student's manifest tells."""
    tower = str(facts.get("tower") or "unknown")
    if tower.startswith(("/", ".", "~")):  # a path says nothing elsewhere
        tower = Path(tower).name
    rows = [("tower", f"{tower} ({facts['tower_type']})")]
    if facts.get("teacher_fingerprint"):
        rows.append(("fingerprint of the teacher", facts["teacher_fingerprint"]))
    rows += [
        (name.replace("_", " "), str(facts[name]))
        for name in ("fingerprint", "num_samples", "steps", "batch_size")
        if facts.get(name)
    ]
    lines = [f"| {name} | `{value}` |" for name, value in rows]
    return "\n".join(["| what | which |", "|---|---|", *lines])


def score_table(scores: dict[str, float]) -> str:
    """Metrics in per cent."""
    lines = [f"| {name} | {100 * value:.1f} |" for name, value in sorted(scores.items())]
    return "\n".join(["| metric | % |", "|---|---|", *lines])
