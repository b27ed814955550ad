"""Settings that cannot be: each is one line that says what to type."""

import pytest

from llm2clip.errors import UsageError
from llm2clip.student.config import SPEED_FIELDS, StudentConfig


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"bank": ()}, r"give bank=\('DIR',\)"),
        ({"loss": "softmx"}, "did you mean 'softmax'"),
        ({"precision": "fp8"}, "choose from auto, fp32, bf16, fp16"),
        ({"steps": 0}, "^steps is 0"),
        ({"steps": 3, "epochs": 1.0}, "exclude each other"),
        ({"batch_size": 1}, "^batch_size is 1"),
        ({"micro_batch_size": 0}, "^micro_batch_size is 0"),
        ({"learning_rate": -1.0}, "^learning_rate is -1.0"),
        ({"mix": {"short": 0.0}}, "weight 0"),
        ({"mix": {"short": -1.0}}, "weights from 0 up"),
        ({"bank_weights": (1.0, 2.0)}, "2 weights for 1 banks"),
        ({"patch_dropout": 1.0}, "^patch_dropout is 1.0"),
        ({"min_crop": 0.0}, "^min_crop is 0.0"),
        ({"lora_rank": 4, "unlocked_blocks": 1}, "leave out unlocked_blocks"),
        ({"captions_per_image": 0}, "^captions_per_image is 0"),
        ({"patience": 2}, "add val_bank='DIR'"),
        ({"val": ("urban1k",), "val_root": "b"}, "val needs vectors of its texts; add val_bank='DIR'"),
        ({"val": ("urban1k",), "val_bank": "v"}, "val urban1k takes val_root='DIR'"),
        ({"val": ("urban",), "val_bank": "v", "val_root": "b"}, "did you mean 'urban1k'"),
        ({"val_score": "r@1"}, "val_score needs scores"),
        ({"label_smoothing": 0.1, "loss": "sigmoid"}, "softmax"),
        ({"max_bad_fraction": 2.0}, "^max_bad_fraction is 2.0"),
        ({"seed": -1}, "^seed is -1"),
        ({"seed": 2**63}, r"below 2\*\*63"),
        ({"weight_decay": float("nan")}, "^weight_decay is nan"),
        ({"mix": {"short": float("nan")}}, "^mix is .*finite"),
        ({"bank_weights": (float("inf"),)}, "^bank_weights is .*finite"),
    ],
)
def test_wrong_settings(wrong, says) -> None:
    with pytest.raises(UsageError, match=says) as error:
        StudentConfig(**{"bank": ("bank",), "tower": "tower", "out": "out", **wrong})
    assert "\n" not in str(error.value)


def test_what_only_changes_speed_is_not_a_setting() -> None:
    settings = StudentConfig(bank=("bank",), tower="tower", out="out", mix={"short": 1.0}).settings()
    assert not set(SPEED_FIELDS) & set(settings)
    assert settings["mix"] == {"short": 1.0} and settings["bank"] == ["bank"]
