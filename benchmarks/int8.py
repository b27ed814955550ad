"""What int8 vectors cost on the miniature's scenes: `python -m benchmarks.int8 DEMO`.

DEMO is the folder of a finished `llm2clip demo --seeds N`. The test captions of each seed go into a float32 bank and an
int8 one, arm D's student reads both, and R@1 is compared; so is the teacher's caption retrieval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch
from torch.nn.functional import normalize

from demo.write import columns
from llm2clip import LLM2CLIP
from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankConfig
from llm2clip.bank.reader import Bank
from llm2clip.data.bad import BadSamples
from llm2clip.eval.encode import encode_images
from llm2clip.scores import Captions, caption_scores, retrieval_scores


def main() -> None:
    """Encode, score and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__)
    parser.add_argument("demo", type=Path)
    demo = parser.parse_args().demo
    runs = [(scores(folder, "float32"), scores(folder, "int8")) for folder in sorted(demo.glob("seed-*"))]
    print("| score | float32 | int8 | gap in points, seed by seed |\n|---|---|---|---|")
    for name in runs[0][0]:
        before, after = (100 * mean(run[i][name] for run in runs) for i in range(2))
        gaps = ", ".join(f"{100 * (b[name] - a[name]):+.1f}" for a, b in runs)
        print(f"| {name} | {before:.2f} | {after:.2f} | {gaps} |")


@torch.inference_mode()
def scores(folder: Path, dtype: str) -> dict[str, float]:
    """R@1 of arm D's student on the test scenes, and caption retrieval, with vectors stored as `dtype`."""
    bank_folder = folder.parent / "int8" / f"{folder.name}-{dtype}"
    teacher = folder / "teachers" / "lora-all"
    build_bank(
        BankConfig(
            data=(str(folder / "data" / "test" / "captions.csv"),),
            captions=columns(),
            teacher=str(teacher),
            out=bank_folder,
            dtype=dtype,
            precision="fp32",
        )
    )
    bank = Bank.open(bank_folder)
    model = LLM2CLIP.from_pretrained(str(folder / "models" / "D-all"), str(teacher))
    samples = (bank.sample(number) for number in range(bank.num_samples))
    kept, images = encode_images(samples, model, batch_size=64, bad=BadSamples(0), threads=2)
    captions = Captions.of(kept)
    row_of = {bank.text(row): row for row in range(bank.num_rows)}
    vectors = torch.from_numpy(bank.vectors([row_of[text] for text in captions.texts])).float()
    texts = normalize(model.student.get_text_features(vectors), dim=-1)
    found = {name: value for name, value, *_ in retrieval_scores(torch.from_numpy(images), texts, captions, ks=(1,))}
    found["mean of R@1"] = mean(found.values())
    return found | {f"teacher {name}": value for name, value, *_ in caption_scores(vectors, captions)}


if __name__ == "__main__":
    main()
