"""--to tower: the vision tower by itself, as a checkpoint of its own family (CLIPVisionModel, Dinov2Model, ...)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.artifacts import read_json, write_json
from llm2clip.errors import LLM2CLIPError
from llm2clip.export.format import Format, Vectors

if TYPE_CHECKING:
    import torch

    from llm2clip.pipeline import LLM2CLIP

USE = """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, {{ tower_class }}

tower = {{ tower_class }}.from_pretrained("."
{%- for name, value in load_options.items() %}, {{ name }}={{ value }}{% endfor %}).eval()  # this folder
processor = AutoImageProcessor.from_pretrained(".")
pixels = processor(images=[Image.open("cat.jpg")], return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    print(tower(pixel_values=pixels).last_hidden_state.shape)
```

It takes the place of the tower it was trained from, for example as the vision tower of a LLaVA."""


def write(model: LLM2CLIP, folder: Path) -> None:
    """Write the tower's weights and config, and how its images are prepared.

    Beside a ViT of timm's lies the class whose hidden states are tokens, for who gives `trust_remote_code=True`.
    """
    tower, transform = model.student.tower, model.transform
    transform.save_with(tower, folder)
    if tower.config.model_type != "timm_wrapper":
        return
    from llm2clip.export import timm_tokens

    if facts := timm_tokens.token_facts(tower, image_size=transform.image_size[0]):
        shutil.copyfile(timm_tokens.__file__, folder / "timm_tokens.py")
        places = {name: f"timm_tokens.TimmTokens{name.removeprefix('Auto')}" for name in ("AutoConfig", "AutoModel")}
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **facts, "auto_map": places})


def expect(model: LLM2CLIP) -> Vectors:
    """The tower's own vectors [4, W] of the probe images, before any projection."""
    import torch

    from llm2clip.export.check import probe_images
    from llm2clip.student.tower import pooled_output

    pixels = torch.stack([model.transform(image) for image in probe_images()]).to(model.device)
    student = model.student
    with torch.inference_mode():
        normalised = (pixels - student.pixel_mean) / student.pixel_std
        pooled = pooled_output(student.tower, normalised.to(student.dtype), pooling=student.config.pooling)
    return {"image": pooled.float().cpu().numpy()}


def reload(folder: Path, facts: dict[str, Any], device: torch.device, in_float32: bool) -> Vectors:
    """The same from the folder, loaded by the class its config names, with the image processor beside it.

    Raises:
        LLM2CLIPError: if transformers has no such class.
    """
    import torch
    import transformers

    from llm2clip.export.check import probe_images
    from llm2clip.hub import cast
    from llm2clip.student.tower import load_options, pooled_output

    name = (transformers.AutoConfig.from_pretrained(folder).architectures or [""])[0]
    tower_class = getattr(transformers, name, None)
    if tower_class is None:
        raise LLM2CLIPError(f"{folder}: transformers {transformers.__version__} has no class {name!r}")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tower = tower_class.from_pretrained(folder, **load_options(tower_class, facts["pooling"]))
    tower = cast(tower, device).eval()  # a half precision that this CPU would emulate: to float32
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in probe_images()])
    with torch.inference_mode():
        pooled = pooled_output(tower, pixels.to(device, tower.dtype), pooling=facts["pooling"])
    return {"image": pooled.float().cpu().numpy()}


FORMAT = Format(
    title="Vision tower trained with LLM2CLIP",
    library="transformers",
    task="image-feature-extraction",
    contents="A `{{ tower_class }}` for {{ images }}; its pooled vectors have {{ tower_dim }} numbers.",
    use=USE,
    write=write,
    expect=expect,
    reload=reload,
)
