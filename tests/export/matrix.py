"""Teachers and towers of every family, small and random, and every export of their students, opened by others.

One side varies at a time: every teacher with a CLIP tower, every tower with a Llama.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t

from llm2clip import LLM2CLIP
from llm2clip.errors import UsageError
from llm2clip.export.card import write_card
from llm2clip.export.check import HIDDEN, MIN_COSINE, PROBE_TEXTS, least_cosine, probe_embeds, probe_images
from llm2clip.export.config import ExportConfig
from llm2clip.export.format import find_format
from llm2clip.export.formats import sentence_transformers, transformers
from llm2clip.export.run import facts_of
from llm2clip.teacher.config import JoinConfig
from llm2clip.teacher.fingerprint import teacher_fingerprint
from llm2clip.teacher.join import join_teachers
from llm2clip.teacher.model import llm_as_encoder, load_teacher, save
from tests.conftest import write_student
from tests.student import released as official
from tests.teacher.conftest import make_llm, write_released

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE: dict[str, Any] = {**SHAPE, "image_size": 32, "patch_size": 8}
MLP: dict[str, Any] = {**IMAGE, "intermediate_size": 64}
TEXT: dict[str, Any] = {**SHAPE, "intermediate_size": 64, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
"""Of a model's text half."""
SQUARE: dict[str, Any] = {"size": {"height": 32, "width": 32}}
CROPPED: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
TEACHERS = {
    "Llama": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma 3": "gemma3",
    "Mistral": "mistral",
    "Phi-3": "phi3",
    "an embedder (BERT)": None,
    "a Llama and a CLIP's text half": None,
    "LLM2CLIP-Llama-3-8B-Instruct-CC": None,
    "LLM2CLIP-Llama-3.2-1B-Instruct-CC": None,
}
"""Names as the table shows them, of LLMs that are trained here with their kind in `make_llm`."""
OFFICIAL = {
    "LLM2CLIP-Openai-*": "openai",
    "LLM2CLIP-EVA02-*": "eva02",
    "LLM2CLIP-Llama3.1-8B-siglip2-*": "siglip2",
}
TOWERS = [
    *("CLIP", "SigLIP", "SigLIP 2, fixed size", "MetaCLIP 2", "DINOv2", "DINOv3 ViT", "DINOv3 ConvNeXt", "ViT"),
    *("timm EVA02", "timm ConvNeXt", "timm SigLIP", *OFFICIAL),
]
LIBRARIES = ("transformers", "sentence-transformers", "timm", "onnxruntime", "open_clip_torch")
LLM, TOWER = "Llama", "CLIP"
PAIRS = [(LLM, TOWER), *((name, TOWER) for name in TEACHERS if name != LLM)]
PAIRS += [(LLM, name) for name in TOWERS if name != TOWER]


def make_teacher(name: str, folder: Path, *, tiny_llm: Path, chat_llm: Path) -> Path:
    """The folder of a teacher."""
    family = TEACHERS[name]
    if family is not None:
        llm = make_llm(folder / "llm", family, tiny_llm)
        (folder / "teacher").mkdir()
        save(llm_as_encoder(llm), folder / "teacher", attention="two-way")
    elif name.startswith("an embedder"):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        torch.manual_seed(5)
        awaken(t.BertModel(t.BertConfig(**SHAPE, intermediate_size=64, vocab_size=128))).save_pretrained(
            folder / "bert"
        )
        t.AutoTokenizer.from_pretrained(tiny_llm, model_max_length=64).save_pretrained(folder / "bert")
        modules = [Transformer(str(folder / "bert")), Pooling(32, "cls"), Normalize()]
        prompts = {"query": "shows ", "document": "this image "}
        model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
        model.save(str(folder / "teacher"), create_model_card=False)
    elif name.endswith("half"):
        torch.manual_seed(5)
        text = t.CLIPTextConfig(**TEXT, max_position_embeddings=16)
        config = t.CLIPConfig(text_config=text.to_dict(), vision_config=MLP, projection_dim=24)
        awaken(t.CLIPModel(config)).save_pretrained(folder / "clip")
        t.AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(folder / "clip")
        t.CLIPImageProcessor(**CROPPED).save_pretrained(folder / "clip")
        llm = make_llm(folder / "llm", "llama", tiny_llm)
        join_teachers(JoinConfig(teachers=(str(llm), str(folder / "clip")), out=folder / "teacher"))
    else:
        write_released(folder / "teacher", "8B" if "8B" in name else "1B", chat_llm)
    return folder / "teacher"


def make_tower(name: str) -> tuple[Any, Any]:  # noqa: C901  (a case a family)
    """A random tower, or the model that it is half of, and its image processor."""
    pair = {"vision_config": MLP, "text_config": {**TEXT, "project_dim": 16, "projection_size": 32}}
    timm = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_mode": "center"}
    match name:
        case "CLIP":
            return t.CLIPVisionModel(t.CLIPVisionConfig(**MLP)), t.CLIPImageProcessor(**CROPPED)
        case "SigLIP":
            return t.SiglipVisionModel(t.SiglipVisionConfig(**MLP)), t.SiglipImageProcessor(**SQUARE)
        case "SigLIP 2, fixed size":  # saved whole, as on the Hub
            config = t.SiglipConfig(**{**pair, "vision_config": {**MLP, "hidden_act": "gelu_pytorch_tanh"}})
            return t.SiglipModel(config), t.SiglipImageProcessor(**SQUARE)
        case "MetaCLIP 2":
            return t.MetaClip2Model(t.MetaClip2Config(**pair, projection_dim=16)), t.CLIPImageProcessor(**CROPPED)
        case "DINOv2":
            margin = {**CROPPED, "size": {"shortest_edge": 37}}
            return t.Dinov2Model(t.Dinov2Config(**IMAGE)), t.BitImageProcessor(**margin)
        case "DINOv3 ViT":
            return t.DINOv3ViTModel(t.DINOv3ViTConfig(**MLP)), t.DINOv3ViTImageProcessor(**SQUARE)
        case "DINOv3 ConvNeXt":
            config = t.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)
            size = {"size": {"height": 64, "width": 64}}
            return t.DINOv3ConvNextModel(config), t.DINOv3ViTImageProcessor(**size)
        case "ViT":
            return t.ViTModel(t.ViTConfig(**MLP)), t.ViTImageProcessor(**SQUARE)
        case "timm EVA02":
            architecture, size, kept = "eva02_tiny_patch14_224", 224, 1.0
        case "timm ConvNeXt":
            architecture, size, kept = "test_convnext", 160, 0.95
        case "timm SigLIP":
            architecture, size, kept = add_siglip(), 32, 0.9
        case _:
            raise AssertionError(name)
    pretrained = {**timm, "input_size": [3, size, size], "crop_pct": kept, "architecture": architecture}
    return t.TimmWrapperModel(t.TimmWrapperConfig(architecture=architecture, pretrained_cfg=pretrained)), None


def add_siglip() -> str:
    """Have timm know a small SigLIP: it has none, and open_clip takes no sizes beside a name."""
    import timm
    from timm.models.vision_transformer import _create_vision_transformer

    def vit_siglip_of_the_tests(pretrained: bool = False, **options):  # type: ignore[no-untyped-def]
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        sizes |= {"class_token": False, "global_pool": "map"}
        return _create_vision_transformer("vit_base_patch16_siglip_224", pretrained=pretrained, **{**sizes, **options})

    timm.models.register_model(vit_siglip_of_the_tests)
    return "vit_siglip_of_the_tests"


def awaken(model: Any) -> Any:
    """Make a random model answer to its inputs: most start out giving nearly one vector for all."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def make_student(name: str, teacher: Path, folder: Path) -> Path:
    """The folder of a student for a teacher, as train-student leaves it or as it was released."""
    if name in OFFICIAL:
        return official.write_checkpoint(folder, OFFICIAL[name])
    torch.manual_seed(1)
    tower, processor = make_tower(name)
    awaken(tower).save_pretrained(folder / "tower")
    if processor is not None:
        processor.save_pretrained(folder / "tower")
    encoder = load_teacher(teacher, device="cpu")
    facts = {"teacher_dim": encoder.get_embedding_dimension(), "teacher_fingerprint": teacher_fingerprint(encoder)}
    return write_student(folder / "tower", folder / "student", **facts)


class Written:
    """What was written of one pair in one format.

    Attributes:
        refused: why the format cannot hold it, in the words of `export`; "" if it can.
        folder: of the export.
        expected: the model's own vectors of the probes.
        more: what who opens it must know.
    """

    def __init__(self, model: LLM2CLIP, form: str, folder: Path) -> None:
        self.form, self.folder, self.refused = form, folder, ""
        self.teacher_dim = model.student.config.teacher_dim
        self.more = {"pooling": model.student.config.pooling} if form == "tower" else {}
        self.expected: dict[str, np.ndarray] = {}
        folder.mkdir(parents=True)
        chosen = find_format(form)
        try:
            chosen.write(model, folder)
        except UsageError as error:
            self.refused = str(error)
            return
        config = ExportConfig(model="a/student", teacher="a/teacher", to=form, out=folder)
        write_card(folder, chosen, facts_of(model, config), scores=None)
        self.expected = chosen.expect(model)


def write_pairs(pairs: Iterable[tuple[str, str]], root: Path, forms: Iterable[str], **models: Path) -> Any:
    """Every format of every pair: {pair: {format: Written}}.

    Args:
        models: `tiny_llm` and `chat_llm`.
    """
    forms, teachers = list(forms), {}
    found: dict[tuple[str, str], dict[str, Written]] = {}
    for number, (teacher, tower) in enumerate(pairs):
        folder = root / str(number)
        if teacher not in teachers:
            teachers[teacher] = make_teacher(teacher, folder / "of-teacher", **models)
        student = make_student(tower, teachers[teacher], folder)
        model = LLM2CLIP.from_pretrained(student, teachers[teacher], device="cpu")
        found[teacher, tower] = {form: Written(model, form, root / "out" / f"{form}-{number}") for form in forms}
    return found


def open_tower(folder: str, probes: Path, device: str, in_float32: bool, pooling: str) -> dict[str, Any]:
    """The tower's pooled vectors of the probes, by the class that its config names."""
    import torch
    import transformers
    from PIL import Image

    config = transformers.AutoConfig.from_pretrained(folder)
    made = getattr(transformers, config.architectures[0])
    tower = made.from_pretrained(folder, **({"add_pooling_layer": False} if made.__name__ == "ViTModel" else {})).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(file) for file in sorted(probes.glob("*.png"))]
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])
    with torch.inference_mode():
        found = tower(pixel_values=pixels)
    image = found.pooler_output.flatten(1) if pooling == "pooler" else found.last_hidden_state[:, 0]
    return {"image": image.numpy()}


def open_onnx(folder: str, probes: Path, device: str, in_float32: bool) -> dict[str, Any]:
    """What both graphs give of the probes."""
    import numpy as np
    import onnxruntime
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(file) for file in sorted(probes.glob("*.png"))]
    pixels = [processor(images=image, return_tensors="np")["pixel_values"] for image in images]
    inputs = {"image": np.concatenate(pixels), "text": np.load(probes / "embeds.npy")}
    found = {}
    for kind, values in inputs.items():
        session = onnxruntime.InferenceSession(f"{folder}/{kind}.onnx", providers=["CPUExecutionProvider"])
        found[kind] = session.run(None, {session.get_inputs()[0].name: values})[0]
    return found


def open_open_clip(folder: str, probes: Path, device: str, in_float32: bool) -> dict[str, Any]:
    """Image vectors of the probes as squares, whose margins open_clip does not round."""
    import open_clip
    import torch
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    size = model.visual.image_size
    side = 2 * (size if isinstance(size, int) else size[0])
    images = [Image.open(file).resize((side, side)) for file in sorted(probes.glob("*.png"))]
    with torch.inference_mode():
        pixels = torch.stack([preprocess(image) for image in images])
        return {"image": model.eval().encode_image(pixels, normalize=True).numpy()}


OPENERS = {
    "sentence-transformers": sentence_transformers.encode,
    "transformers": transformers.encode,
    "tower": open_tower,
    "onnx": open_onnx,
    "open-clip": open_open_clip,
}
OPEN_ALL = """
import json
folder = Path(sys.argv[1])
plan, found, failed = json.loads((folder / "plan.json").read_text()), {}, {}
exec(plan["first"])
for number, (source, name, options) in enumerate(plan["calls"]):
    names = {"Any": Any, "Path": Path}
    exec(source, names)
    try:
        vectors = names[name](device="cpu", in_float32=True, **{**options, "probes": Path(options["probes"])})
    except Exception as error:
        failed[number] = f"{type(error).__name__}: {error}"
        continue
    found |= {f"{number} {kind}": numpy.asarray(values) for kind, values in vectors.items()}
numpy.savez(folder / "found.npz", **found)
(folder / "failed.json").write_text(json.dumps(failed))
"""
"""What the fresh process runs, behind `HIDDEN`: it cannot import llm2clip."""


def write_probes(folder: Path, teacher_dim: int) -> Path:
    """The probes as files."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(probe_images()):
        image.save(folder / f"{i}.png")
    (folder / "texts.txt").write_text("\n".join(PROBE_TEXTS), encoding="utf-8")
    np.save(folder / "embeds.npy", probe_embeds(teacher_dim).numpy())
    return folder


def open_all(written: Iterable[Written], root: Path) -> dict[Path, str]:
    """Of each folder "ok" or what is wrong with it, all opened by one fresh process without llm2clip."""
    folders = [one for one in written if not one.refused]
    calls = []
    for one in folders:
        encode, probes = OPENERS[one.form], write_probes(root / f"probes-{one.teacher_dim}", one.teacher_dim)
        options = {"folder": str(one.folder), "probes": str(probes), **one.more}
        calls.append((inspect.getsource(encode), encode.__name__, options))
    first = f"{inspect.getsource(add_siglip)}\nadd_siglip()" if "timm" in sys.modules else ""
    (root / "plan.json").write_text(json.dumps({"first": first, "calls": calls}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN + OPEN_ALL, str(root)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    failed = json.loads((root / "failed.json").read_text())
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(root / "found.npz") as arrays:
        for name in arrays.files:
            found.setdefault(int(name.split()[0]), {})[name.split()[1]] = arrays[name]
    return {one.folder: failed.get(str(i)) or judge(one.expected, found[i]) for i, one in enumerate(folders)}


def judge(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> str:
    """ "ok", or what is wrong with the vectors."""
    for kind, vectors in expected.items():
        others = vectors.reshape(len(vectors), -1)
        if least_cosine(others[:1].repeat(len(others) - 1, 0), others[1:]) > 0.999:
            return f"all {kind} vectors are alike: nothing is shown"
        if not (cosine := least_cosine(vectors, found[kind])) >= MIN_COSINE:
            return f"other {kind} vectors: least cosine {cosine:.6f}"
    return "ok"


Cells = Mapping[tuple[str, str], Mapping[str, str]]
"""Of each pair and format "ok", or why there is none."""
BEGIN, END = "<!-- written by tests/export/test_matrix.py -->", "<!-- end -->"


def run_matrix(pairs: Iterable[tuple[str, str]], root: Path, forms: Iterable[str], **models: Path) -> Cells:
    """Write every format of every pair and open them all."""
    found = write_pairs(pairs, root, forms, **models)
    opened = open_all([one for each in found.values() for one in each.values()], root)
    return {pair: {form: one.refused or opened[one.folder] for form, one in of.items()} for pair, of in found.items()}


def as_table(cells: Cells, forms: list[str], date: str) -> str:
    """The cells as Markdown, reasons below as numbered notes."""
    reasons = list(dict.fromkeys(cell for of in cells.values() for cell in of.values() if cell != "ok"))
    lines = [f"Run on {date}, with " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES) + ".", ""]
    lines += ["| teacher | tower | " + " | ".join(forms) + " |", "|---" * (2 + len(forms)) + "|"]
    for (teacher, tower), of in cells.items():
        row = ["ok" if of[form] == "ok" else f"({1 + reasons.index(of[form])})" for form in forms]
        lines.append(f"| {teacher} | {tower} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def read_table(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of what `as_table` wrote."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    reasons = {f"({line.split('.')[0]})": line.split(". ", 1)[1] for line in text.splitlines() if line[:1].isdigit()}
    found = {}
    for teacher, tower, *row in rows[2:]:
        cells = dict(zip(rows[0][2:], row, strict=True))
        found[teacher, tower] = {form: reasons.get(cell, cell) for form, cell in cells.items()}
    return found
