"""--to onnx: the tower with its projection, and the adaptor, for programs that run ONNX; the teacher stays beside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.errors import UsageError, setting
from llm2clip.export.format import Format, Vectors
from llm2clip.export.formats.transformers import expect

if TYPE_CHECKING:
    import torch

    from llm2clip.pipeline import LLM2CLIP

IMAGE, TEXT = "image.onnx", "text.onnx"
USE = """Both files take any number of rows and give vectors of unit length. Images go in as `preprocessor_config.json`
says.

```python
import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

folder = "."  # this folder
processor = AutoImageProcessor.from_pretrained(folder)
pixels = processor(images=[Image.open("cat.jpg")], return_tensors="pt")["pixel_values"].numpy()
image = onnxruntime.InferenceSession(f"{folder}/image.onnx").run(None, {"pixel_values": pixels})[0]
teacher_vectors = np.random.randn(2, {{ teacher_dim }}).astype(np.float32)  # of texts, from the teacher named below
text = onnxruntime.InferenceSession(f"{folder}/text.onnx").run(None, {"text_embeds": teacher_vectors})[0]
print(text @ image.T)
```

The teacher, a large language model, is not in this folder: its vectors of texts are what `text.onnx` takes."""


def write(model: LLM2CLIP, folder: Path) -> None:
    """Write both graphs, their weights in a file beside each, float32, and how images are prepared.

    Raises:
        UsageError: if what writes or runs ONNX is not installed.
    """
    import copy

    import torch
    from torch.nn.functional import normalize

    check_installed()
    student = copy.deepcopy(model.student).float().cpu().eval()

    class Image(torch.nn.Module):
        """Normalised pixels [B, 3, H, W] as unit vectors [B, D]."""

        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return normalize(self.student.get_image_features(pixel_values), dim=-1)

    class Text(torch.nn.Module):
        """Teacher vectors [B, T] as unit vectors [B, D]."""

        def __init__(self) -> None:
            super().__init__()
            self.adaptor = student.adaptor

        def forward(self, text_embeds: torch.Tensor) -> torch.Tensor:
            return normalize(self.adaptor(text_embeds), dim=-1)

    height, width = model.transform.image_size
    for file, module, name, example in (
        (IMAGE, Image(), "pixel_values", torch.zeros(2, 3, height, width)),
        (TEXT, Text(), "text_embeds", torch.zeros(2, student.config.teacher_dim)),
    ):
        program: Any = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            input_names=[name],
            output_names=["embeds"],
            dynamic_shapes={name: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        drop_notes(program.model)
        program.save(folder / file, external_data=True)  # one file holds two gigabytes at most
    model.transform.save(folder)


def drop_notes(model: Any) -> None:
    """Take out what torch notes on each part of a graph: the lines of Python it is from, with this machine's paths."""
    for graph in (model.graph, *model.functions.values()):
        nodes = list(graph.all_nodes())
        for part in (graph, *nodes, *graph.inputs, *(value for node in nodes for value in node.outputs)):
            part.metadata_props.clear()
            part.doc_string = None


def check_installed() -> None:
    """Raise a UsageError if a package of the extra is missing."""
    import importlib.util

    names = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{setting('to', 'onnx')} needs {', '.join(missing)}: pip install 'llm2clip[onnx]'")


def reload(folder: Path, facts: dict[str, Any], device: torch.device, in_float32: bool) -> Vectors:
    """The vectors of the probes, all in a batch, by onnxruntime."""
    import onnxruntime
    import torch
    from transformers import AutoImageProcessor

    from llm2clip.export.check import probe_embeds, probe_images

    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in probe_images()])
    inputs = {"image": (IMAGE, pixels), "text": (TEXT, probe_embeds(facts["teacher_dim"]))}
    found = {}
    for kind, (file, values) in inputs.items():
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        found[kind] = session.run(None, {session.get_inputs()[0].name: values.numpy()})[0]
    return found


FORMAT = Format(
    title="LLM2CLIP student as ONNX",
    library="onnx",
    task="image-feature-extraction",
    contents="`image.onnx`: {{ images }} to {{ space }}. `text.onnx`: the vectors of its teacher ({{ teacher_dim }} "
    "numbers) to the same space.",
    use=USE,
    write=write,
    expect=expect,
    reload=reload,
)
