"""The mini models that ship with the package load as ordinary folders and know what they should, and no more."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel

from demo import make_models
from demo.clip import CONTEXT, ClipTraining, image_vectors, new_clip, padded, text_vectors
from demo.llm import Pretraining, new_llm, next_token_loss, token_batches
from demo.make_models import clip_pairs
from demo.run import SHIPPED
from demo.tokens import make_tokenizer

UNIGRAM_LOSS = 4.5
"""About what a model that knows only how often each word occurs would get; an untrained one has ln 591 = 6.4."""


@pytest.mark.parametrize("name", ["llm", "clip"])
def test_what_ships_is_small_and_says_how_it_was_made(name: str) -> None:
    folder = SHIPPED / name
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 12 * 2**20
    origin = json.loads((folder / "origin.json").read_text())
    assert {"how", "machine", "torch", "wall_seconds", "cpu_seconds", "log"} <= set(origin)
    how = Pretraining(**origin["how"]) if name == "llm" else ClipTraining(**origin["how"])
    assert how == (make_models.LLM if name == "llm" else make_models.CLIP), "the script makes another model by now"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.ci
def test_the_llm_predicts_new_text(tmp_path: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(SHIPPED / "llm", dtype=torch.float32)
    how = Pretraining(steps=1, batch_size=8, seed=12345)
    with torch.no_grad():
        loss = float(next_token_loss(llm, next(token_batches(make_tokenizer(), how))))
    assert loss < UNIGRAM_LOSS / 2


def test_the_llm_knows_a_translation_it_has_read() -> None:
    llm = AutoModelForCausalLM.from_pretrained(SHIPPED / "llm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "llm")

    def loss(text: str) -> float:
        with torch.no_grad():
            return float(next_token_loss(llm, tokenizer(text, return_tensors="pt")["input_ids"]))

    right = loss("a red star to the left of a blue circle = 红色星形在蓝色圆形的左边")
    wrong = loss("a red star to the left of a blue circle = 绿色方形在白色心形的左边")
    assert right < wrong - 0.2


def test_the_clip_finds_images_by_known_words() -> None:
    clip = CLIPModel.from_pretrained(SHIPPED / "clip", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "clip")
    pairs = clip_pairs(100, tokenizer, seed=777)
    with torch.no_grad():
        images = image_vectors(clip, pairs.pixels)
        texts = text_vectors(clip, [c["short"][0] for c in pairs.captions], context=32)
    right = ((images @ texts.T).argmax(1) == torch.arange(100)).float().mean()
    assert right > 0.5  # chance 0.01


def test_a_new_llm_and_its_batches() -> None:
    how = Pretraining(steps=1, width=16, layers=1, heads=2, inner=32, batch_size=3, length=20)
    tokenizer = make_tokenizer()
    first, second = islice(token_batches(tokenizer, how), 2)
    assert first.shape == second.shape == (3, 20) and not torch.equal(first, second)
    assert torch.equal(first, next(token_batches(tokenizer, how)))
    assert new_llm(len(tokenizer), how).config.tie_word_embeddings


def test_cut_captions_keep_their_closing_token() -> None:
    tokens, mask = padded([[1, 7, 8, 9, 3], [1, 7, 3]], context=4)
    assert tokens.tolist() == [[1, 7, 8, 3], [1, 7, 3, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


@pytest.mark.slow
def test_a_models_script_makes_loadable_folders(tmp_path: Path) -> None:
    how = Pretraining(steps=2, width=16, layers=1, heads=2, inner=32, batch_size=2, length=16, warmup_steps=1)
    llm = AutoModelForCausalLM.from_pretrained(make_models.make_llm(tmp_path / "llm", how))
    assert llm.config.hidden_size == 16
    folder = make_models.make_clip(tmp_path / "clip", ClipTraining(steps=2, batch_size=4, warmup_steps=1), images=8)
    assert CLIPModel.from_pretrained(folder).config.text_config.max_position_embeddings == CONTEXT
    assert json.loads((folder / "origin.json").read_text())["images"] == 8
    assert new_clip(30, seed=0).config.projection_dim == 128
