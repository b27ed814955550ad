"""Makes folders.tar.xz: small folders of every kind, and their vectors, as commit 54488bc writes and computes them.

Run it with the code of that commit, on a CPU; it writes the archive beside itself:

    git worktree add --detach ../llm2clip-54488bc 54488bc
    PYTHONPATH=../llm2clip-54488bc/src OMP_NUM_THREADS=1 python tests/made_by_54488bc/make.py

Made again, all but the seconds in logs and the order of names in a peft config are the same bytes. Do not add folders
that later code wrote: the point of the archive is that it is old. Images and captions are given to
that code by memory:// URLs, because a bank holds whole paths and those of a machine are no business of an archive.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).resolve().with_name("folders.tar.xz")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<turn>", "</turn>"]
WORDS = "a the this shows is on of small large plain red green blue yellow dark light disc square background .".split()
TURN = "{% for m in messages %}<turn>{{ m['content'] }}</turn>{% endfor %}"
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIDE = {"height": 16, "width": 16}
TEXTS = ["a red disc", "this shows a large blue square on a dark background .", "yellow", "the disc is not a square"]
DATA = "memory://fixture/captions.csv"


def model_at(folder: str, model: Any, *parts: Any) -> str:
    """A random model's folder and what reads for it; weights so spread that another input gives another vector."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder


def tokenizer(closing: str = "") -> Any:
    """A tokenizer of whole words that can wrap a caption as a user's turn."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<s>", 1), ("</s>", 2)]
    words.post_processor = processors.TemplateProcessing(single=f"<s> $A {closing}".strip(), special_tokens=special)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    turns = {"extra_special_tokens": SPECIAL[4:], "chat_template": TURN}
    return t.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names, **turns)


def make_models() -> None:
    """Two LLMs, a CLIP and a DINOv2, all random."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    llama = t.LlamaConfig(**LAYERS, **TOKENS, num_key_value_heads=1, max_position_embeddings=64)
    qwen = t.Qwen3Config(**LAYERS, **TOKENS, num_key_value_heads=1, max_position_embeddings=64, head_dim=8)
    one = {**LAYERS, "num_hidden_layers": 1, "hidden_size": 8}
    text = {**one, **TOKENS, "max_position_embeddings": 16}
    picture = {**LAYERS, "image_size": 16, "patch_size": 8}
    clip = t.CLIPConfig(text_config=text, vision_config=picture, projection_dim=8)
    dino = t.Dinov2Config(**{**picture, "mlp_ratio": 2, "patch_size": 4}, layerscale_value=0.5)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": SIDE}
    model_at("models/llama", t.LlamaForCausalLM(llama), tokenizer())
    model_at("models/qwen3", t.Qwen3ForCausalLM(qwen), tokenizer())
    model_at("models/clip", t.CLIPModel(clip), tokenizer("</s>"), t.CLIPImageProcessor(**sizes))
    model_at("models/dinov2", t.Dinov2Model(dino), t.BitImageProcessor(**sizes))


def make_images() -> None:
    """Eight PNGs, two of them of the towers' size, and their captions, in `pictures` and in fsspec's memory."""
    import fsspec
    import numpy as np
    from PIL import Image

    memory = fsspec.filesystem("memory")
    lines = ["image,short_caption,long_caption"]
    Path("pictures").mkdir()
    for i in range(8):
        y, x = np.mgrid[: 16 + 3 * (i // 2), : 16 + 5 * (i // 2)]
        waves = [np.sin(y * (i + 1) / 9), np.cos(x * (9 - i) / 11), np.sin((x + y) * (i % 3 + 1) / 7 + i)]
        colours = np.stack(waves, axis=2) * 100 + 128
        Image.fromarray(colours.astype(np.uint8)).save(f"pictures/{i}.png")
        colour, shape = ("red", "green", "blue", "yellow")[i % 4], ("disc", "square")[i // 4]
        long = f"this shows a {colour} {shape} on a {'dark' if i % 3 else 'light'} background ."
        lines.append(f"{i}.png,a {colour} {shape},{long}")
    Path("pictures/captions.csv").write_text("\n".join(lines) + "\n")
    for file in Path("pictures").iterdir():
        memory.pipe_file(f"/fixture/{file.name}", file.read_bytes())


def make_folders() -> None:
    """Teachers, banks, students and exports, each by the function behind its verb."""
    import llm2clip as l

    learn = {"data": (DATA,), "steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    teachers: dict[str, dict[str, Any]] = {
        # bf16 was the default; the weights are saved in it
        "lora": {"model": "models/llama", "chat_template": True, "lora_rank": 2, "save_adapter": True},
        "full": {"model": "models/qwen3", "tuning": "full", "adaptor_layers": 1, "precision": "fp32"},
    }
    for name, settings in teachers.items():
        l.train_teacher(l.TeacherConfig(**learn, **settings, out=Path(f"teachers/{name}")))
    members = ("teachers/full", "models/clip")
    l.join_teachers(l.JoinConfig(teachers=members, weights=(1.0, 0.5), out=Path("teachers/joined")))
    banks: dict[str, dict[str, Any]] = {
        "full": {"prompt": "this shows ", "dtype": "float16"},
        "joined": {"dtype": "int8", "shard_rows": 6},
    }
    for name, settings in banks.items():
        l.build_bank(l.BankConfig(data=(DATA,), teacher=f"teachers/{name}", out=Path(f"banks/{name}"), **settings))
    for tower, name in (("clip", "full"), ("dinov2", "joined")):
        how = {"steps": 3, "batch_size": 8, "learning_rate": 1e-2, "dim": 12, "adaptor_blocks": 1, "precision": "fp32"}
        models = {"bank": (f"banks/{name}",), "tower": f"models/{tower}", "out": Path(f"students/{tower}")}
        l.train_student(l.StudentConfig(**models, **how, workers=0, tracker="none"))
        for kind in ("sentence-transformers", "transformers", "tower"):
            teacher = f"teachers/{name}" if kind == "sentence-transformers" else None
            out = Path(f"exports/{tower}-{kind}")
            l.export_model(l.ExportConfig(model=f"students/{tower}", teacher=teacher, to=kind, out=out, device="cpu"))
        pair = {"model": f"students/{tower}", "teacher": f"teachers/{name}"}
        l.evaluate(l.EvaluateConfig(**pair, data=("pictures/captions.csv",), out=Path(f"reports/{tower}")))


def compute_vectors() -> dict[str, Any]:
    """What that commit gives for the folders, by "KIND NAME WHAT"."""
    import numpy as np
    import torch
    import transformers as t
    from PIL import Image

    import llm2clip as l

    vectors = {}
    for name in ("lora", "full", "joined"):
        for dtype in ("auto", "float32"):
            teacher = l.load_teacher(f"teachers/{name}", device="cpu", dtype=dtype)
            vectors[f"teacher {name} {dtype}"] = np.asarray(teacher.encode(TEXTS), np.float32)
    for name in ("full", "joined"):
        bank = l.Bank.open(f"banks/{name}")
        vectors[f"bank {name}"] = np.asarray(bank.vectors(np.arange(bank.num_rows)), np.float32)
    pictures = [f"pictures/{i}.png" for i in range(6)]
    for tower, name in (("clip", "full"), ("dinov2", "joined")):
        model = l.LLM2CLIP.from_pretrained(f"students/{tower}", teacher=f"teachers/{name}", device="cpu")
        vectors[f"student {tower} text"] = model.encode_text(TEXTS)
        vectors[f"student {tower} image"] = model.encode_image(pictures)
        embeds = torch.from_numpy(vectors[f"teacher {name} float32"])
        with torch.inference_mode():
            vectors[f"student {tower} adaptor"] = model.student.get_text_features(embeds).numpy()
        folder = f"exports/{tower}-tower"
        inputs = t.AutoImageProcessor.from_pretrained(folder)(images=[Image.open(file) for file in pictures[:2]])
        with torch.inference_mode():
            pooled = t.AutoModel.from_pretrained(folder)(torch.tensor(np.stack(inputs["pixel_values"]))).pooler_output
        vectors[f"tower {tower}"] = pooled.numpy()
    return vectors


def write_archive() -> None:
    """What opening a finished folder needs, in one archive that says nothing of when it was made."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o644
        return entry

    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:  # xz sees that an export repeats its student
        for file in sorted(path for path in Path().rglob("*") if path.is_file()):
            if file.parts[0] != "models" and "checkpoints" not in file.parts:
                archive.add(file, filter=plain)


def main() -> None:
    """Make everything in a folder that is thrown away, under names that are relative to it."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    if importlib.util.find_spec("llm2clip.captions") is None:
        sys.exit("this is not the code of 54488bc; the first lines of this file say how to run it")
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_models()
        make_images()
        make_folders()
        Path("texts.json").write_text(json.dumps(TEXTS))
        np.savez("vectors.npz", **compute_vectors())
        write_archive()
        os.chdir(ARCHIVE.parent)


if __name__ == "__main__":
    main()
