"""--to open-clip: tower and projection in open_clip's form; its text half has no place for an LLM's vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.errors import UsageError, setting
from llm2clip.export.format import Format, Vectors

if TYPE_CHECKING:
    import torch

    from llm2clip.pipeline import LLM2CLIP

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXT = {"context_length": 2, "vocab_size": 3, "width": 8, "heads": 1, "layers": 1}
"""The smallest text half that open_clip builds; its weights are random."""
NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
"""Parts of names of a CLIP tower: transformers' and open_clip's."""
USE = """The image half alone: open_clip has no place for the vectors of a large language model, so that **the text half
in this folder is a placeholder with random weights**; `encode_text` means nothing. Texts go through the teacher and
llm2clip.

```python
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")  # this folder
model.eval()
with torch.inference_mode():
    print(model.encode_image(preprocess(Image.open("cat.jpg"))[None], normalize=True).shape)
```

Where an image's margin is an odd number of pixels, open_clip crops a pixel further than llm2clip."""


def write(model: LLM2CLIP, folder: Path) -> None:
    """Write config and weights.

    Raises:
        UsageError: if open_clip is not installed, or has no place for such a tower.
    """
    from safetensors.torch import save_file

    from llm2clip.artifacts import write_json

    config = {"model_cfg": model_config(model), "preprocess_cfg": preprocess_config(model)}
    try:
        import open_clip
    except ImportError:
        raise UsageError(f"{setting('to', 'open-clip')} needs open_clip: pip install 'llm2clip[metrics]'") from None
    cfg = {name: value for name, value in config["model_cfg"].items() if name != "custom_text"}
    whole = open_clip.CustomTextCLIP(**cfg)
    state, visual = whole.state_dict(), visual_weights(model)
    wanted = {name: value.shape for name, value in state.items() if name.startswith("visual.")}
    if wanted != {name: value.shape for name, value in visual.items()}:
        raise UsageError(
            f"open_clip builds a {model.student.config.vision_config.model_type} of this name with other sizes; take "
            f"{setting('to', 'onnx')} or {setting('to', 'tower')}"
        )
    state |= {**visual, "logit_scale": model.student.logit_scale.detach().float().cpu().reshape([])}
    write_json(folder / CONFIG, config)
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / WEIGHTS, {"format": "pt"})


def model_config(model: LLM2CLIP) -> dict[str, Any]:
    """What open_clip builds the model of.

    Raises:
        UsageError: if it builds no such tower.
    """
    config = model.student.config
    vision, linear = config.vision_config, config.projection == "linear"
    size = {"image_size": model.transform.image_size[0]}
    common = {"embed_dim": config.projection_dim, "text_cfg": TEXT, "custom_text": True}
    if vision.model_type == "timm_wrapper":
        timm = {"timm_model_name": vision.architecture, "timm_model_pretrained": False}
        timm |= {"timm_pool": "" if linear else "map", "timm_proj": "linear" if linear else "none"}
        timm["timm_proj_bias"] = config.projection_bias
        return {**common, "vision_cfg": {**timm, **size}}
    if vision.model_type != "clip_vision_model" or not linear or config.projection_bias:
        raise UsageError(
            f"open_clip has no tower as this one ({vision.model_type}); take {setting('to', 'onnx')} or "
            f"{setting('to', 'tower')}"
        )
    sizes = {"layers": vision.num_hidden_layers, "width": vision.hidden_size, "patch_size": vision.patch_size}
    sizes |= {"head_width": vision.hidden_size // vision.num_attention_heads}
    sizes |= {"mlp_ratio": vision.intermediate_size / vision.hidden_size}
    return {**common, "vision_cfg": {**sizes, **size}, "quick_gelu": vision.hidden_act == "quick_gelu"}


def preprocess_config(model: LLM2CLIP) -> dict[str, Any]:
    """How open_clip prepares images.

    Raises:
        UsageError: if it cannot as the student wants them.
    """
    transform = model.transform
    if transform.resize not in (transform.image_size[0], transform.image_size):
        raise UsageError(
            f"open_clip crops no margin away, and this student's images are resized to {transform.resize} and cropped "
            f"to {transform.image_size[0]}; take {setting('to', 'onnx')} or {setting('to', 'tower')}"
        )
    return {
        "mean": list(transform.mean),
        "std": list(transform.std),
        "interpolation": {2: "bilinear"}.get(int(transform.resample), "bicubic"),
        "resize_mode": "shortest" if isinstance(transform.resize, int) else "squash",
    }


def visual_weights(model: LLM2CLIP) -> dict[str, torch.Tensor]:
    """The weights of tower and projection by open_clip's names, float32."""
    import torch

    student = model.student
    tower = {name: value.detach().float().cpu() for name, value in student.tower.state_dict().items()}
    head = {name: value.detach().float().cpu() for name, value in student.visual_projection.state_dict().items()}
    if student.config.vision_config.model_type == "timm_wrapper":
        found = {f"visual.trunk.{name.removeprefix('timm_model.')}": value for name, value in tower.items()}
        return {**found, **{f"visual.head.proj.{name}": value for name, value in head.items()}}
    found = {"visual.proj": head["weight"].T}
    for source, value in tower.items():
        name = source.removeprefix("vision_model.")
        if ".k_proj." in name or ".v_proj." in name or name.endswith("position_ids"):
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if ".q_proj." in name:
            value = torch.cat([tower[source.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        found[f"visual.{name}"] = value
    return found


def squares(model_size: int) -> list[Any]:
    """The probe images without margins, which open_clip rounds otherwise."""
    from llm2clip.export.check import probe_images

    return [image.resize((2 * model_size, 2 * model_size)) for image in probe_images()]


def expect(model: LLM2CLIP) -> Vectors:
    """The model's own vectors of square probe images."""
    return {"image": model.encode_image(squares(model.transform.image_size[0]))}


def reload(folder: Path, facts: dict[str, Any], device: torch.device, in_float32: bool) -> Vectors:
    """The same by open_clip, with its own preparation of images."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(image) for image in squares(facts["image_size"][0])])
    with torch.inference_mode():
        return {"image": model.eval().encode_image(pixels, normalize=True).numpy()}


FORMAT = Format(
    title="LLM2CLIP image half for open_clip",
    library="open_clip",
    task="zero-shot-image-classification",
    contents="{{ images }} to {{ space }}.",
    use=USE,
    write=write,
    expect=expect,
    reload=reload,
)
