"""How fast captions become vectors: the bank builder, SentenceTransformer.encode and LLM2Vec against the bare LLM.

The bare LLM runs on full batches of equal length, with the lengths the captions have: no padding, no tokenizer,
nothing written. Captions: half of 8-20 words, half of 40-220 (mean 95). On a CPU a random Llama of about 25 M
parameters, on a GPU one of the size of Llama-3-8B.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from llm2clip.bank.build import Plan, write_bank
from llm2clip.bank.collect import Intake
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.load import TeacherFacts, load_for_encoding
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import PictureRef, Sample
from llm2clip.hub import pick_device, pick_precision

SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
VOCABULARY = 8192
REPEATS = 3


def captions(count: int, *, seed: int = 0) -> list[str]:
    """Distinct captions of made-up words, half short (8-20 words), half long (40-220, mean 95)."""
    draw = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(draw.choice(letters, size)) for size in draw.integers(2, 10, 4000)]
    popularity = 1 / np.arange(1, len(words) + 1)
    popularity /= popularity.sum()
    short = draw.integers(8, 21, count // 2)
    long = np.clip(40 + draw.gamma(1.9, 29, count - count // 2), 40, 220).astype(int)
    lengths = draw.permutation(np.concatenate([short, long]))
    return [" ".join(words[i] for i in draw.choice(len(words), size, p=popularity)) for size in lengths]


def make_llm(folder: Path, texts: list[str], *, sizes: dict[str, int]) -> Path:
    """A random Llama with a BPE tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=sizes["num_attention_heads"] // 4,
        max_position_embeddings=512,
        pad_token_id=0,
        dtype="bfloat16",
        **sizes,
    )
    with torch.device("cuda" if sizes is LARGE else "cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@torch.inference_mode()
def bare_rate(model: torch.nn.Module, lengths: np.ndarray, *, batch_tokens: int, device: torch.device) -> float:
    """Tokens a second of the LLM alone on full batches of equal length; the lengths hold equal shares of all tokens."""
    by_tokens = np.sort(lengths)
    share = np.cumsum(by_tokens) / by_tokens.sum()
    typical = [int(by_tokens[np.searchsorted(share, (i + 0.5) / 12)]) for i in range(12)]
    batches = [torch.randint(3, VOCABULARY, (max(1, batch_tokens // size), size), device=device) for size in typical]
    seconds, tokens = 0.0, 0
    for batch in batches:
        seconds += timed(lambda batch=batch: model(input_ids=batch, use_cache=False), device)
        tokens += batch.numel()
    return tokens / seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build(encoder: CaptionEncoder, texts: list[str], folder: Path, facts: TeacherFacts) -> None:
    """Build a bank from the captions: collect, tokenise, encode, write, checksum, manifest."""
    samples = [Sample(str(i), PictureRef(f"{i}.jpg"), {"raw": (text,)}) for i, text in enumerate(texts)]
    intake = Intake(samples, "benchmark", BadSamples(0))
    write_bank(
        Plan(
            out=folder,
            settings={},
            teacher=facts,
            encoder=encoder,
            intake=lambda: intake,
            dtype="float16",
            shard_rows=32768,
        )
    )


def llm2vec_encode(llm: torch.nn.Module, folder: Path, texts: list[str], device: str) -> Callable[[], object] | None:
    """LLM2Vec's own `encode` around the same LLM; None where the package is not installed.

    Its own model classes do not import with transformers 5; they are left out, since the LLM attends both ways already.
    """
    if importlib.util.find_spec("llm2vec") is None:
        return None
    from transformers import AutoTokenizer

    classes = types.ModuleType("llm2vec.models")
    for name in ("Mistral", "Llama", "Gemma", "Qwen2"):
        setattr(classes, f"{name}BiModel", None)
    sys.modules.setdefault("llm2vec.models", classes)
    from llm2vec import LLM2Vec

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = LLM2Vec(llm, tokenizer, pooling_mode="mean", max_length=512, doc_max_length=512)
    return lambda: model.encode(texts, batch_size=32, show_progress_bar=False, device=device)


def run(device: str) -> list[dict]:
    """Rows for the table of `python -m benchmarks encode`."""
    logging.getLogger("llm2clip").setLevel(logging.WARNING)
    where = pick_device(device)
    count, sizes = (20_000, LARGE) if where.type == "cuda" else (3_000, SMALL)
    texts = captions(count)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_llm(Path(scratch) / "llm", texts, sizes=sizes)
        precision = pick_precision("auto", where)
        teacher = load_for_encoding(str(folder), device=where, precision=precision)
        llm = teacher[0].model
        parameters = sum(p.numel() for p in llm.parameters())
        encoder = CaptionEncoder(teacher)
        lengths = encoder.prepare(texts).tokens.lengths
        tokens = int(lengths.sum())
        facts = TeacherFacts("benchmark", "0", "", precision, encoder.dim)
        folders = iter(range(10**6))
        ways: dict[str, Callable[[], object]] = {
            "bank building": lambda: build(encoder, texts, Path(scratch) / f"bank{next(folders)}", facts),
            "SentenceTransformer.encode": lambda: teacher.encode(texts, show_progress_bar=False),
        }
        if (peer := llm2vec_encode(llm, folder, texts, str(where))) is not None:
            ways["LLM2Vec.encode"] = peer
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for repeat in range(REPEATS + 1):
            before = bare_rate(llm, lengths, batch_tokens=encoder.batch_tokens, device=where)
            for name, way in ways.items():
                rate = tokens / timed(way, where)
                after = bare_rate(llm, lengths, batch_tokens=encoder.batch_tokens, device=where)
                if repeat:  # the first warms up
                    rates[name].append((rate, (before + after) / 2))
                before = after
    bare = [limit for pairs in rates.values() for _, limit in pairs]
    rows = [
        {
            "name": f"bare LLM, full batches of equal length ({parameters / 1e6:.0f} M parameters, {precision})",
            "value": statistics.median(bare),
            "unit": "tokens/s",
        }
    ]
    rows += [row(name, pairs) for name, pairs in rates.items()]
    return rows + ([matmul_share(parameters, bare, where)] if where.type == "cuda" else [])


def row(name: str, pairs: list[tuple[float, float]]) -> dict:
    """One row: the median rate, and the median of its ratios to what the bare LLM did just before and after."""
    ratios = sorted(rate / limit for rate, limit in pairs)
    return {
        "name": name,
        "value": statistics.median(rate for rate, _ in pairs),
        "unit": "tokens/s",
        "ratio": statistics.median(ratios),
        "against": f"the bare LLM, {ratios[0]:.2f} to {ratios[-1]:.2f}",
    }


def matmul_share(parameters: int, rates: list[float], device: torch.device) -> dict:
    """The bare LLM's arithmetic (2 FLOP a parameter and token) as a share of what one large matmul reaches."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = min(timed(lambda: a @ b, device) for _ in range(10))
    peak = 2 * 8192**3 / seconds
    achieved = 2 * parameters * statistics.median(rates)
    return {
        "name": "arithmetic of the bare LLM",
        "value": achieved / 1e12,
        "unit": "TFLOP/s",
        "ratio": achieved / peak,
        "against": "one 8192 x 8192 bf16 matmul",
    }
