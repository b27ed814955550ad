"""The tiny random models and the data that both checkouts of `scripts/same` read; made with the libraries alone."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220), "yellow": (230, 220, 50)}
WORDS = (
    "a an the of on in with and is small large plain red green blue yellow disc square picture shows one two dark "
    "background left right shape colour this that its find near far sentence another user assistant : ."
).split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
TURNS = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"


def make_shared(folder: Path) -> None:
    """Write everything into `folder`."""
    folder.mkdir(parents=True)
    write_models(folder)
    rows = write_images(folder)
    write_tables(folder, rows)
    write_tars(folder, rows)
    pairs = [{"query": r["short_caption"], "positive": r["long_caption"], "negative": r["note"]} for r in rows]
    (folder / "nli.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "plain.txt").write_text(
        "".join(f"the {a} of the {b} is near the {a} .\n" for a in WORDS for b in COLOURS)
    )


def write_models(folder: Path) -> None:
    """An LLM (and one with a chat template), a SentenceTransformer with prompts, and four vision models."""
    import transformers as hf
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as st

    width: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    width["num_attention_heads"] = 4
    image = {**width, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    llama = hf.LlamaConfig(**width, vocab_size=128, num_key_value_heads=2, max_position_embeddings=512)
    llama.pad_token_id, llama.bos_token_id, llama.eos_token_id = 0, 1, 2
    llm = hf.LlamaForCausalLM(llama)
    for name, template in (("llm", None), ("llm-chat", TURNS)):
        llm.save_pretrained(folder / name)
        write_tokenizer(folder / name, template)
    bert = hf.BertConfig(**width, vocab_size=128, max_position_embeddings=512)
    hf.BertModel(bert).save_pretrained(folder / "bert")
    write_tokenizer(folder / "bert", None)
    body = st.Transformer(str(folder / "bert"), max_seq_length=64)
    prompts = {"query": "find : ", "document": ""}
    SentenceTransformer(modules=[body, st.Pooling(32)], prompts=prompts, device="cpu").save(str(folder / "st"))
    text = hf.CLIPTextConfig(**width, vocab_size=128, max_position_embeddings=32, pad_token_id=0, projection_dim=32)
    text.bos_token_id, text.eos_token_id = 1, 2
    clip = hf.CLIPConfig(
        text_config=text.to_dict(),
        vision_config=hf.CLIPVisionConfig(**image, projection_dim=32).to_dict(),
        projection_dim=32,
    )
    size = {"height": 32, "width": 32}
    clip_images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    for name, model, processor in (
        ("tower", hf.CLIPVisionModel(hf.CLIPVisionConfig(**image, projection_dim=32)), clip_images),
        ("clip", hf.CLIPModel(clip), clip_images),
        ("siglip", hf.SiglipVisionModel(hf.SiglipVisionConfig(**image)), hf.SiglipImageProcessor(size=size)),
        ("vit", hf.ViTModel(hf.ViTConfig(**image)), hf.ViTImageProcessor(size=size)),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_tokenizer(folder / "clip", None)


def write_tokenizer(folder: Path, template: str | None) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("<s>", 1), ("</s>", 2)]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def write_images(folder: Path) -> list[dict[str, str]]:
    """24 images of a shape; returns their rows. Twelve short captions are of two images each."""
    rows = []
    for i in range(24):
        colour, shape = list(COLOURS)[i % 4], ("disc", "square")[i // 4 % 2]
        size = ("small", "large", "plain")[i // 8]
        image = Image.new("RGB", (48 + i, 40), (30, 30, 30 + 5 * i))
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "disc" else draw.rectangle)((8, 8, 18 + 8 * (i // 8), 30), fill=COLOURS[colour])
        image.save(folder / f"{i:03d}.jpg", quality=92)
        long = f"this picture shows a {size} {colour} {shape} on a dark background . the {shape} is {colour} ."
        names = {"image": f"{i:03d}.jpg", "mirror": f"{23 - i:03d}.jpg"}
        rows.append(
            {**names, "short_caption": f"a {size} {colour} shape", "long_caption": long, "note": f"near {colour}"}
        )
    return rows


def write_tables(folder: Path, rows: list[dict[str, str]]) -> None:
    """The rows as tables of every format, a folder, and tables with bad rows, other captions, images elsewhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_csv(folder / "captions.csv", rows)
    write_csv(folder / "captions.tsv", rows, delimiter="\t")
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")
    write_csv(
        folder / "bad.csv", [{**row, "image": "missing.jpg"} if i in (3, 9) else row for i, row in enumerate(rows)]
    )
    write_csv(folder / "more.csv", [{**row, "short_caption": f"one of {row['short_caption']}"} for row in rows[:12]])
    (folder / "sub").mkdir()
    write_csv(folder / "sub" / "outside.csv", [{**row, "image": f"../{row['image']}"} for row in rows])
    good = (folder / "000.jpg").read_bytes()
    for i in (3, 9):
        (folder / f"broken-{i}.jpg").write_bytes(good[: len(good) // 3])
    write_csv(
        folder / "broken.csv", [{**r, "image": f"broken-{i}.jpg"} if i in (3, 9) else r for i, r in enumerate(rows)]
    )
    (folder / "folder").mkdir()
    for row in rows:
        (folder / "folder" / row["image"]).write_bytes((folder / row["image"]).read_bytes())
    named = [{"file_name": row["image"], "short_caption": row["short_caption"], "note": row["note"]} for row in rows]
    write_csv(folder / "folder" / "metadata.csv", [{**row, "long_caption": f"{row['note']} and far"} for row in named])


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> None:
    """Rows as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_tars(folder: Path, rows: list[dict[str, str]]) -> None:
    """Two tars of twelve samples: image, .txt and .json."""
    (folder / "tars").mkdir()
    for part in range(2):
        with tarfile.open(folder / "tars" / f"{part:02d}.tar", "w") as tar:
            for row in rows[part * 12 : part * 12 + 12]:
                texts = {"long_caption": row["long_caption"], "short_caption": row["short_caption"]}
                add(tar, row["image"], (folder / row["image"]).read_bytes())
                add(tar, row["image"].replace("jpg", "txt"), row["note"].encode())
                add(tar, row["image"].replace("jpg", "json"), json.dumps(texts).encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """One file of a tar."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
