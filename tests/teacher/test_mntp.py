"""Masked next-token prediction: the loss by hand, the masks, and the step as a whole."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorForTokenClassification

from llm2clip.errors import SourceError, UsageError
from llm2clip.teacher import mntp
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.train import train_teacher


@pytest.fixture
def tokenizer(llm_of):
    return mntp.load_causal_lm(llm_of("llama"), max_length=64, dtype="float32")[1]


def masked(tokenizer, *, share, seed=0):
    return mntp.MaskedTexts(CAPTIONS, LINES, tokenizer, share=share, mask_id=4, seed=seed)


def test_loss_by_hand_on_five_tokens(llm_of):
    """Tokens 2 and 4 are hidden: each is predicted from the state of the token before it, which sees all five."""
    model, tokenizer = mntp.load_causal_lm(llm_of("llama"), max_length=32, dtype="float32")
    model.config.is_causal = False
    model.eval()
    ids, mask_id = [1, 10, 11, 12, 13], 4
    row = {"input_ids": [1, 10, mask_id, 12, mask_id], "labels": [-100, -100, 11, -100, 13]}
    batch = DataCollatorForTokenClassification(tokenizer)([row])
    with torch.no_grad():
        loss = model(**batch).loss
        states = model.model(input_ids=batch["input_ids"]).last_hidden_state[0]
    logits = states @ model.lm_head.weight.T
    by_hand = -(logits[1].log_softmax(0)[ids[2]] + logits[3].log_softmax(0)[ids[4]]) / 2
    torch.testing.assert_close(loss, by_hand)
    model.config.is_causal = True
    with torch.no_grad():
        assert not torch.isclose(model(**batch).loss, by_hand)


def test_masks_hide_a_fifth_mostly_behind_the_mask_token(tokenizer):
    texts = masked(tokenizer, share=0.2)
    ids, counts = [1, *range(10, 40), 2], {"mask": 0, "kept": 0, "other": 0, "hidden": 0}
    others = set()
    for i in range(2000):
        inputs, labels = texts.hide(ids, random.Random(i)).values()
        assert labels[0] == labels[-1] == -100
        for token, read, label in zip(ids, inputs, labels, strict=True):
            if label == -100:
                assert read == token
                continue
            assert label == token
            counts["hidden"] += 1
            counts["mask" if read == 4 else "kept" if read == token else "other"] += 1
            others.add(read)
    hidden = counts["hidden"]
    assert 0.19 < hidden / (2000 * 30) < 0.21
    assert 0.78 < counts["mask"] / hidden < 0.82 and 0.08 < counts["kept"] / hidden < 0.12
    assert others == set(range(len(tokenizer)))  # what takes a token's place is drawn from the whole vocabulary


def test_a_short_text_has_one_hidden_token_and_an_empty_one_none(tokenizer):
    texts = masked(tokenizer, share=0.01)
    assert texts.hide([1, 5], random.Random(0))["labels"] == [-100, 5]
    assert texts.hide([1], random.Random(0)) == {"input_ids": [1], "labels": [-100]}
    assert texts.hide([], random.Random(0)) == {"input_ids": [], "labels": []}


def test_the_first_token_is_never_hidden_special_or_not(tokenizer):
    """Nothing stands before it, from which it could be predicted; tokenizers like Qwen's put no special token there."""
    texts = masked(tokenizer, share=0.9)
    assert 5 not in tokenizer.all_special_ids
    for i in range(50):
        assert texts.hide([5, 6], random.Random(i))["labels"] == [-100, 6]


def test_a_word_that_stands_for_hidden_tokens_stays_a_word(tokenizer):
    """It may be hidden itself, and the tokenizer that is saved with the teacher knows nothing of it."""
    word = tokenizer.convert_tokens_to_ids("red")
    texts = mntp.MaskedTexts(CAPTIONS, LINES, tokenizer, share=0.9, mask_id=word, seed=0)
    rows = [texts.hide([1, 10, word], random.Random(i)) for i in range(50)]
    assert {row["labels"][2] for row in rows} == {-100, word} and {row["input_ids"][1] for row in rows} >= {10, word}
    assert tokenizer.mask_token_id == 4 and word not in tokenizer.all_special_ids


CAPTIONS = [{"texts": [f"a {colour} disc on the left of the dark background"]} for colour in ("red", "green")]
LINES = [{"text": f"there is a {size} square near the top of the plain shape"} for size in ("small", "large", "plain")]


def test_what_is_hidden_is_another_part_in_each_pass_and_with_each_seed(tokenizer):
    texts = [masked(tokenizer, share=0.3, seed=seed) for seed in (0, 1)]
    assert len(texts[0]) == 5
    for index, text in enumerate([row["texts"][0] for row in CAPTIONS] + [row["text"] for row in LINES]):
        rows = [texts[0][0, epoch, index] for epoch in range(4)] + [texts[1][0, epoch, index] for epoch in range(4)]
        for row in rows:  # the whole text, put together again
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            assert [token if label == -100 else label for token, label in pairs] == tokenizer(text)["input_ids"]
        assert len({tuple(row["labels"]) for row in rows}) > 6
        assert texts[0][0, 2, index] == rows[2]
    hidden = {tuple(label != -100 for label in texts[0][0, 0, i]["labels"]) for i in (2, 3, 4)}
    assert len(hidden) == 3  # nor is it the same part of each text


def test_a_caption_of_each_image_is_drawn_in_each_pass(tokenizer):
    rows = [{"texts": ["a red disc", "there is a large disc on the left"]}]
    texts = mntp.MaskedTexts(rows, [], tokenizer, share=0.3, mask_id=4, seed=0)
    assert {len(texts[0, epoch, 0]["labels"]) for epoch in range(20)} == {4, 9}


def test_padding_is_right_and_unlabelled(tokenizer):
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1], "labels": [-100]}]
    batch = DataCollatorForTokenClassification(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[1, 2], [1, 0]]
    assert batch["labels"].tolist() == [[-100, 2], [-100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_the_mask_token_must_be_one(tokenizer):
    assert mntp.mask_token_id(tokenizer, None) == tokenizer.mask_token_id
    assert mntp.mask_token_id(tokenizer, "red") == tokenizer.convert_tokens_to_ids("red")
    tokenizer.mask_token = None
    with pytest.raises(UsageError, match="'_' is not one token"):
        mntp.mask_token_id(tokenizer, None)
    for wrong in ("red disc", "nosuchword"):
        with pytest.raises(UsageError, match="not one token"):
            mntp.mask_token_id(tokenizer, wrong)


@pytest.fixture
def config(tmp_path, tiny_llm, images_csv):
    def make(name: str, **changes: object) -> TeacherConfig:
        settings = {
            "data": (str(images_csv),),
            "model": str(tiny_llm),
            "out": tmp_path / name,
            "steps": 2,
            "batch_size": 6,
            "precision": "fp32",
            "learning_rate": 1e-2,
            "mntp": True,
            "mntp_steps": 30,
            "mntp_batch_size": 8,
            "save_every": 10,
        }
        return TeacherConfig(**{**settings, **changes})

    return make


@pytest.mark.ci
def test_the_step_learns_and_resumes_to_the_same_bytes(config, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the small disc is near the left\n\nthere is a large square in the middle\n" * 3)
    whole = train_teacher(config("whole", mntp_text=(str(text),)))
    lines = [json.loads(line) for line in (whole / "mntp.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 30 and lines[-1]["loss"] < lines[0]["loss"] - 0.15

    class Killed(Exception):
        pass

    original = mntp.MaskedTexts.__getitem__
    seen = []

    def dies(self, key):
        seen.append(key)
        if len(seen) > 8 * 15:
            raise Killed
        return original(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(mntp.MaskedTexts, "__getitem__", dies)
        with pytest.raises(Killed):
            train_teacher(config("killed", mntp_text=(str(text),)))
    resumed = train_teacher(config("killed", mntp_text=(str(text),)))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    without = train_teacher(config("without", mntp=False))
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, without))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) > 1e-2


def test_every_weight_can_be_trained(config):
    out = train_teacher(config("full", tuning="full", mntp_steps=3, learning_rate=1e-3))
    assert json.loads((out / "manifest.json").read_text())["config"]["mntp"] is True


def test_what_cannot_work_ends_in_one_line(config, tmp_path):
    with pytest.raises(UsageError, match="24 texts, fewer than mntp_batch_size 25"):
        train_teacher(config("a", mntp_batch_size=25))
    with pytest.raises(SourceError, match="cannot be read"):
        train_teacher(config("b", mntp_text=(str(tmp_path / "none.txt"),)))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(SourceError, match="holds no text"):
        train_teacher(config("c", mntp_text=(str(tmp_path / "blank.txt"),)))
