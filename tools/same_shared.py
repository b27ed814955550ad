"""The tiny random models and the data that both checkouts of `scripts/same` read; made with the libraries alone."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220), "yellow": (230, 220, 50)}
WORDS = (
    "<pad> <s> </s> <unk> <mask> a an the of on in with and is small large plain red green blue yellow disc square "
    "image shows one two dark background left right shape colour this that its find near far user : ."
).split()
TURNS = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
LAST = "tars/01.tar"
Rows = list[dict[str, str]]


def make_shared(folder: Path) -> None:
    """Write everything into `folder`, unless it is there."""
    if (folder / LAST).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_models(folder)
    rows = write_images(folder)
    write_tables(folder, rows)
    (folder / "tars").mkdir()
    for part in range(2):
        write_tar(folder, f"{part:02d}.tar", rows[part * 12 : part * 12 + 12])


def write_models(folder: Path) -> None:
    """An LLM (and one with a chat template), a SentenceTransformer with prompts, and four vision models."""
    import torch
    import transformers as hf
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as st

    torch.manual_seed(0)
    width: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    width["num_attention_heads"] = 4
    words = {**width, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    image, shape = {**width, "image_size": 32, "patch_size": 8}, {"height": 32, "width": 32}
    clip = {"vision_config": image, "text_config": {**words, "max_position_embeddings": 32}, "projection_dim": 32}
    llm = hf.LlamaForCausalLM(hf.LlamaConfig(**words, num_key_value_heads=2, max_position_embeddings=512))
    processor = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=shape)
    for name, parts in {
        "llm": (llm, tokenizer()),
        "llm-chat": (llm, tokenizer(TURNS)),
        "bert": (hf.BertModel(hf.BertConfig(**words)), tokenizer()),
        "tower": (hf.CLIPVisionModel(hf.CLIPVisionConfig(**image)), processor),
        "clip": (hf.CLIPModel(hf.CLIPConfig(**clip)), processor, tokenizer()),
        "siglip": (hf.SiglipVisionModel(hf.SiglipVisionConfig(**image)), hf.SiglipImageProcessor(size=shape)),
        "vit": (hf.ViTModel(hf.ViTConfig(**image)), hf.ViTImageProcessor(size=shape)),
    }.items():
        for part in parts:
            part.save_pretrained(folder / name)
    modules = [st.Transformer(str(folder / "bert"), max_seq_length=64), st.Pooling(32)]
    prompts = {"query": "find : ", "document": ""}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder / "st"))


def tokenizer(template: str | None = None) -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("<s>", 1), ("</s>", 2)]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    special = zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), WORDS, strict=False)
    made = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **dict(special))
    made.chat_template = template
    return made


def write_images(folder: Path) -> Rows:
    """24 images of a shape; returns their rows. Each short caption is that of two images."""
    from PIL import Image, ImageDraw

    rows = []
    for i in range(24):
        colour, shape, size = list(COLOURS)[i % 4], ("disc", "square")[i // 4 % 2], ("small", "large", "plain")[i // 8]
        image = Image.new("RGB", (48 + i, 40), (30, 30, 30 + 5 * i))
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "disc" else draw.rectangle)((8, 8, 18 + 8 * (i // 8), 30), fill=COLOURS[colour])
        image.save(folder / f"{i:03d}.jpg", quality=92)
        long = f"this image shows a {size} {colour} {shape} on a dark background . the {shape} is {colour} ."
        names = {"image": f"{i:03d}.jpg", "mirror": f"{23 - i:03d}.jpg"}
        rows.append(
            {**names, "short_caption": f"a {size} {colour} shape", "long_caption": long, "note": f"near {colour}"}
        )
    return rows


def write_tables(folder: Path, rows: Rows) -> None:
    """The rows in every format, in a folder, with bad rows, with other captions, beside their images; and texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def changed(names: dict[int, str]) -> Rows:
        return [{**row, "image": names.get(i, row["image"])} for i, row in enumerate(rows)]

    def lines(items: Rows) -> str:
        return "".join(json.dumps(item) + "\n" for item in items)

    start = (folder / "000.jpg").read_bytes()[:300]
    (folder / "half.jpg").write_bytes(start)
    (folder / "sub").mkdir()
    (folder / "folder").mkdir()
    for row in rows:
        (folder / "folder" / row["image"]).write_bytes((folder / row["image"]).read_bytes())
    for name, table in {
        "captions.csv": rows,
        "captions.tsv": rows,
        "more.csv": [{**row, "short_caption": f"one of {row['short_caption']}"} for row in rows[:12]],
        "bad.csv": changed({3: "missing.jpg", 9: "missing.jpg"}),
        "broken.csv": changed({3: "half.jpg", 9: "half.jpg"}),
        "sub/outside.csv": changed({i: f"../{row['image']}" for i, row in enumerate(rows)}),
        "folder/metadata.csv": [{"file_name": r["image"], "text": r["note"], "long_caption": "far"} for r in rows],
    }.items():
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0], delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(table)
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")
    (folder / "captions.jsonl").write_text(lines(rows))
    triplets = [{"query": r["short_caption"], "positive": r["long_caption"], "negative": r["note"]} for r in rows]
    (folder / "nli.jsonl").write_text(lines(triplets))
    (folder / "plain.txt").write_text(
        "".join(f"the {a} of the {b} is near the {a} .\n" for a in WORDS for b in COLOURS)
    )


def write_tar(folder: Path, name: str, rows: Rows) -> None:
    """A tar of samples: image, .txt and .json."""
    with tarfile.open(folder / "tars" / name, "w") as tar:
        for row in rows:
            texts = {"long_caption": row["long_caption"], "short_caption": row["short_caption"]}
            for suffix, content in {
                "jpg": (folder / row["image"]).read_bytes(),
                "txt": row["note"].encode(),
                "json": json.dumps(texts).encode(),
            }.items():
                entry = tarfile.TarInfo(row["image"].replace("jpg", suffix))
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
