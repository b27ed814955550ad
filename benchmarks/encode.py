"""How fast captions become vectors: the bank builder, SentenceTransformer.encode and LLM2Vec against the bare LLM.

The bare LLM runs on full batches of equal length, with the lengths the captions have: no padding, no tokenizer,
nothing written. Captions: short of 8-20 words, long of 40-220 (mean 95), mixed half of each. On a CPU a random Llama of
about 25 M parameters, on a GPU ones of the shapes of Llama-3.2-1B and Llama-3.1-8B, made there in bf16; all have a
vocabulary of 8,192, which changes no product of theirs. The parts take turns.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import statistics
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.device import clock_mhz, product_rate, rounds, share_of, timed
from benchmarks.rows import spread
from llm2clip.bank.build import Plan, write_bank
from llm2clip.bank.collect import Intake
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.load import TeacherFacts, load_for_encoding, use_flash_attention
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.hub import DTYPES, pick_device, pick_precision

VOCABULARY = 8192
SKELETON = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One LLM and the captions it is measured on."""

    name: str = ""
    """Put before the names of the rows."""
    llm: dict[str, int]
    texts: tuple[tuple[str, int], ...]
    """Kinds of captions, and how many."""
    quick: int = 1
    """Without --full this part of them is taken, as the rows say."""
    shard_rows: int
    """Captions in a file of the bank: some, so that texts of the next are tokenised meanwhile, as in a real bank."""
    rounds: int
    warm_up: float
    """Share of the captions that are encoded before the first round."""
    lengths: int = 12
    """Batches of the bare LLM, each of one length."""
    peers: bool = True
    product: int = 8192
    """Side of the matrices whose product is the limit."""


SETTINGS = {
    "tiny": Setting(
        name="tiny Llama: ",
        llm=SKELETON,
        texts=(("mixed", 40), ("short", 20)),
        shard_rows=40,
        rounds=1,
        warm_up=0.1,
        lengths=3,
        product=256,
    ),
    "cpu": Setting(
        llm={"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8},
        texts=(("mixed", 3_000),),
        quick=4,
        shard_rows=32768,
        rounds=3,
        warm_up=1.0,
    ),
    "1B": Setting(
        name="Llama-3.2-1B: ",
        llm={"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        texts=(("mixed", 6_000), ("short", 12_000), ("long", 4_000)),
        shard_rows=2_000,
        rounds=5,
        warm_up=0.2,
        lengths=6,
    ),
    "8B": Setting(
        name="Llama-3.1-8B: ",
        llm={"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        texts=(("mixed", 2_000), ("short", 3_000), ("long", 1_000)),
        shard_rows=500,
        rounds=5,
        warm_up=0.1,
        lengths=2,
        peers=False,
    ),
}
GPU_SIZES = ("1B", "8B")


def captions(count: int, kind: str = "mixed", *, seed: int = 0) -> list[str]:
    """Distinct captions of made-up words: "short" of 8-20 words, "long" of 40-220 (mean 95), or half of each."""
    draw = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(draw.choice(letters, size)) for size in draw.integers(2, 10, 4000)]
    popularity = 1 / np.arange(1, len(words) + 1)
    popularity /= popularity.sum()
    num_short = {"mixed": count // 2, "short": count, "long": 0}[kind]
    short = draw.integers(8, 21, num_short)
    long = np.clip(40 + draw.gamma(1.9, 29, count - num_short), 40, 220).astype(int)
    lengths = draw.permutation(np.concatenate([short, long]))
    drawn = iter(draw.choice(len(words), lengths.sum(), p=popularity))
    return [" ".join(words[i] for i in itertools.islice(drawn, size)) for size in lengths.tolist()]


def llama(sizes: dict[str, int], dtype: torch.dtype, *, head: bool = False) -> Any:
    """A random Llama, with a head that gives tokens or without, on torch's device of the moment."""
    from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=sizes["num_attention_heads"] // 4,
        max_position_embeddings=512,
        pad_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    return (AutoModelForCausalLM if head else AutoModel).from_config(config, dtype=dtype)


def make_llm(folder: Path, texts: list[str], *, sizes: dict[str, int]) -> Path:
    """A random Llama with a BPE tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    ).save_pretrained(folder)
    llama(sizes, torch.bfloat16, head=True).save_pretrained(folder)
    return folder


def teacher_of(sizes: dict[str, int], folder: Path, where: torch.device, precision: str) -> Any:
    """A teacher around a random Llama of these sizes, which is made where it computes and never written.

    Args:
        folder: of a small LLM with the tokenizer; the large one takes its place.
    """
    teacher: Any = load_for_encoding(str(folder), device=where, precision=precision)
    with where:
        llm = llama(sizes, DTYPES[precision]).eval()
    llm.config.is_causal = False
    teacher[0].model = llm
    if where.type == "cuda":
        teacher[0].unpad_inputs = None  # what was found of the small one
        use_flash_attention(teacher)
    return teacher


@torch.inference_mode()
def bare_rate(model: torch.nn.Module, lengths: np.ndarray, *, number: int, batch_tokens: int, device: str) -> float:
    """Tokens a second of the LLM alone on full batches, `number` of them, each of one length.

    The lengths hold equal shares of all tokens.
    """
    by_tokens = np.sort(lengths)
    share = np.cumsum(by_tokens) / by_tokens.sum()
    typical = [int(by_tokens[np.searchsorted(share, (i + 0.5) / number)]) for i in range(number)]
    batches = [torch.randint(3, VOCABULARY, (max(1, batch_tokens // size), size), device=device) for size in typical]
    seconds, tokens = 0.0, 0
    for batch in batches:
        seconds += timed(lambda batch=batch: model(input_ids=batch, use_cache=False), device)
        tokens += batch.numel()
    return tokens / seconds


def build(encoder: CaptionEncoder, texts: list[str], folder: Path, facts: TeacherFacts, *, shard_rows: int) -> None:
    """Build a bank from the captions: collect, tokenise, encode, write, checksum, manifest."""
    samples = [Sample(str(i), ImageRef(f"{i}.jpg"), {"raw": (text,)}) for i, text in enumerate(texts)]
    intake = Intake(samples, "benchmark", BadSamples(0))
    write_bank(
        Plan(
            out=folder,
            settings={},
            teacher=facts,
            encoder=encoder,
            intake=lambda: intake,
            dtype="float16",
            shard_rows=shard_rows,
        )
    )


def llm2vec_encode(llm: torch.nn.Module, folder: Path, device: str) -> Callable[[list[str]], object] | None:
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
    return lambda texts: model.encode(texts, batch_size=32, show_progress_bar=False, device=device)


def run(settings: list[Setting], device: str, until: float | None = None) -> Iterator[dict]:
    """Rows for the table of `python -m benchmarks encode`."""
    logging.getLogger("llm2clip").setLevel(logging.WARNING)
    for left, setting in zip(range(len(settings), 0, -1), settings, strict=True):
        if until is not None and setting.quick > 1:
            texts = tuple((kind, count // setting.quick) for kind, count in setting.texts)
            setting = replace(setting, texts=texts)
        yield from measure(setting, device, share_of(until, left))


def measure(setting: Setting, device: str, until: float | None) -> Iterator[dict]:
    """Rows of one LLM, those of a kind of captions as soon as they are measured."""
    where = pick_device(device)
    precision = pick_precision("auto", where)
    texts = {kind: captions(count, kind) for kind, count in setting.texts}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_llm(Path(scratch) / "llm", texts["mixed"], sizes=SKELETON)
        teacher = teacher_of(setting.llm, folder, where, precision)
        encoder = CaptionEncoder(teacher)
        facts = TeacherFacts("benchmark", "0", "", precision, encoder.dim)
        folders = (Path(scratch) / f"bank{number}" for number in itertools.count())
        ways: dict[str, Callable[[list[str]], object]] = {
            "bank building": lambda texts: build(encoder, texts, next(folders), facts, shard_rows=setting.shard_rows)
        }
        peers: dict[str, Callable[[list[str]], object]] = {}
        if setting.peers:
            peers["SentenceTransformer.encode"] = lambda texts: teacher.encode(texts, show_progress_bar=False)
        if setting.peers and (llm2vec := llm2vec_encode(teacher[0].model, folder, device)) is not None:
            peers["LLM2Vec.encode"] = llm2vec
        for left, (kind, some) in zip(range(len(texts), 0, -1), texts.items(), strict=True):
            chosen = ways | peers if kind == "mixed" else ways
            yield from compare(setting, kind, some, encoder, chosen, device, share_of(until, left))


def compare(
    setting: Setting,
    kind: str,
    texts: list[str],
    encoder: CaptionEncoder,
    ways: dict[str, Callable[[list[str]], object]],
    device: str,
    until: float | None,
) -> Iterator[dict]:
    """Rows of one kind of captions: the bare LLM, and each of `ways` against what it did just before and after."""
    llm = encoder.teacher[0].model
    precision = {dtype: name for name, dtype in DTYPES.items()}[llm.dtype]
    prepared = encoder.prepare(texts).tokens
    assert prepared is not None, "a Llama's tokens are known ahead"
    lengths, tokens = prepared.lengths, int(prepared.lengths.sum())

    def bare() -> float:
        number, batch_tokens = setting.lengths, encoder.batch_tokens
        return bare_rate(llm, lengths, number=number, batch_tokens=batch_tokens, device=device)

    bare()
    for way in ways.values():
        way(texts[: int(setting.warm_up * len(texts))])
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    limits = []
    for _ in rounds(setting.rounds, until):
        before = bare()
        for name, way in ways.items():
            rate = tokens / timed(lambda way=way: way(texts), device)
            after = bare()
            rates[name].append((rate, (before + after) / 2))
            before = after
        if setting.name:
            limits.append(product_rate(device, precision, size=setting.product))
    start = f"{setting.name}{kind} captions, " if setting.name else f"{len(texts):,} captions, "
    yield from rows(setting, start, rates, limits, llm=llm, precision=precision, clock=clock_mhz(device))
    if setting.name:
        seconds = [tokens / rate for rate, _ in rates["bank building"]]
        number = [len(texts) / one for one in seconds]
        yield {
            "name": f"{start}bank building",
            "value": statistics.median(number),
            "unit": "captions/s",
            "spread": spread(number),
            "against": f"{tokens / len(texts):.0f} tokens a caption",
        }


def rows(
    setting: Setting,
    start: str,
    rates: dict[str, list[tuple[float, float]]],
    limits: list[float],
    *,
    llm: torch.nn.Module,
    precision: str,
    clock: int | None,
) -> Iterator[dict]:
    """The bare LLM, as a share of what a matrix product reaches where that was measured; then the others."""
    bare = [limit for pairs in rates.values() for _, limit in pairs]
    parameters = sum(p.numel() for p in llm.parameters())
    row: dict[str, Any] = {
        "name": f"{start}bare LLM, full batches of equal length ({parameters / 1e6:.0f} M parameters, {precision})",
        "value": statistics.median(bare),
        "unit": "tokens/s",
    }
    if limits:
        computing = parameters - llm.get_input_embeddings().weight.numel()  # 2 FLOP of each a token
        limit = statistics.median(limits)
        shares = [2 * computing * rate / limit for rate in bare]
        product = f"{limit / 1e12:.4g} TFLOP/s of a {precision} product of {setting.product:,} x {setting.product:,}"
        row |= {"ratio": statistics.median(shares), "against": product, "spread": spread(shares), "clock_mhz": clock}
    yield row
    for name, pairs in rates.items():
        ratios = [rate / limit for rate, limit in pairs]
        yield {
            "name": f"{start}{name}",
            "value": statistics.median(rate for rate, _ in pairs),
            "unit": "tokens/s",
            "ratio": statistics.median(ratios),
            "against": "the bare LLM",
            "spread": spread(ratios),
            "clock_mhz": clock,
        }
