"""Out of memory is one line that names what to lower, with its value now, for each verb that has such a setting."""

from __future__ import annotations

import importlib

import pytest
import torch

from llm2clip import cli

SAID_BY_TORCH = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB"
)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (
            "train-student --bank b --tower t --out o",
            "give a small --micro-batch-size or --gradient-checkpointing or a small --batch-size",
        ),
        (
            "train-student --bank b --tower t --out o --micro-batch-size 64 --gradient-checkpointing --batch-size 512",
            "give a smaller --micro-batch-size (now 64) or a smaller --batch-size (now 512)",
        ),
        (
            "train-teacher --data hf:d --model m --out o --precision fp32",
            "give a small --micro-batch-size or --gradient-checkpointing or --precision bf16",
        ),
        (
            "train-teacher --data hf:d --model m --out o --micro-batch-size 8",
            "give a smaller --micro-batch-size (now 8) or --gradient-checkpointing",
        ),
        (
            "build-bank --data hf:d --teacher t --out o --batch-tokens 9000",
            "give a smaller --batch-tokens (now 9000) or --device cpu",
        ),
        ("bank add b --data hf:d --out o", "give a small --batch-tokens or --device cpu"),
        ("bank verify b", "give --device cpu"),
        (
            "evaluate --model m --data hf:d --out o --precision bf16",
            "give a smaller --batch-size (now 64) or --device cpu",
        ),
        ("export --model m --to tower --out o", "give --device cpu"),
        ("export --model m --to tower --out o --device cpu", "it takes a machine that has more"),
        ("join-teachers --teachers a b --out o", "it takes a machine that has more"),
    ],
)
def test_the_line(words: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = cli.find_verb(words.split())
    module, _, function = cli.VERBS[name].function.partition(":")

    def no_memory(config: object) -> None:
        raise torch.OutOfMemoryError(SAID_BY_TORCH)

    monkeypatch.setattr(importlib.import_module(module), function, no_memory)
    monkeypatch.setattr(cli, "_look_first", lambda config: None)  # none of these models and sources exists
    assert cli.run(words.split()) == 1
    expected = f"llm2clip: error: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB); {advice}\n"
    assert capsys.readouterr().err == expected


def test_every_flag_named_is_one() -> None:
    for verb in cli.VERBS.values():
        module, _, name = verb.config.partition(":")
        fields = vars(importlib.import_module(module))[name].__dataclass_fields__
        for flag in verb.memory:
            assert flag.split()[0].removeprefix("--").replace("-", "_") in fields
