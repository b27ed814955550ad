"""What is chosen for few images, where it is left open, and told."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from llm2clip import few
from llm2clip.student import train as training
from llm2clip.student.config import StudentConfig
from llm2clip.student.train import settle_few as settle_student
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher.train import settle_few as settle_teacher

LLM: Any = SimpleNamespace(config={"hidden_size": 1024})
FEW_TOLD = "300 images are few: steps=100, learning_rate=0.0008, unless told otherwise (docs/few-images.md)"


def teacher(images: int, **settings: Any) -> TeacherConfig:
    return settle_teacher(TeacherConfig(model="llm", data=("a.csv",), out="out", **settings), [images], LLM)


def test_a_teacher_of_few_images(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llm2clip")
    found = teacher(300)
    assert (found.steps, found.epochs, found.learning_rate) == (100, None, 8e-4)
    assert caplog.messages[0] == FEW_TOLD and "join=('TOWER',)" in caplog.messages[1]
    assert (teacher(300, learning_rate=1e-5).learning_rate, teacher(300, learning_rate=1e-5).steps) == (1e-5, 100)
    caplog.clear()
    assert teacher(300, join=("clip",)).steps == 100 and len(caplog.messages) == 1, "it is advised no more"
    for length in ({"epochs": 3}, {"steps": 7}):
        own = teacher(300, **length)
        assert {"steps": own.steps, "epochs": own.epochs, "rate": own.learning_rate} == {
            "steps": None,
            "epochs": None,
            "rate": 2e-4,
            **length,
        }
    assert teacher(300, tuning="full").learning_rate == 2e-4, "the rule is for adapters"
    caplog.clear()
    teacher(300, steps=7)
    assert caplog.messages == ["300 images are few: beside steps also give learning_rate=0.0008 (docs/few-images.md)"]
    teacher(300, epochs=7, learning_rate=1e-5)
    assert len(caplog.messages) == 1, "all but the length was given"
    caplog.clear()
    many = teacher(few.FEW_IMAGES)
    assert (many.steps, many.epochs, many.learning_rate) == (None, None, 2e-4) and not caplog.messages


class Banks:
    """Stands for banks that hold as many images as their names say."""

    @staticmethod
    def open(name: str) -> Any:
        return SimpleNamespace(num_samples=int(name))


def student(*banks: str, processes: int = 1, **settings: Any) -> StudentConfig:
    accelerator = SimpleNamespace(num_processes=processes, is_main_process=True)
    return settle_student(StudentConfig(bank=banks, tower="t", out="out", **settings), accelerator)


def test_a_student_of_few_images(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(training, "Bank", Banks)
    caplog.set_level(logging.INFO, logger="llm2clip")
    found = student("200", "100")
    assert (found.batch_size, found.steps, found.unlocked_blocks) == (128, 160, 0)
    assert caplog.messages[-1].startswith("300 images are few: batch_size=128, steps=160, unlocked_blocks=0")
    assert student("100").batch_size == 100 and student("100", processes=3).batch_size == 99
    assert (
        student("300", lora_rank=4).unlocked_blocks is None and student("300", unlocked_blocks=2).unlocked_blocks == 2
    )
    assert student("300", init="random").unlocked_blocks is None, "a random tower has to learn"
    assert student("9000", "100", bank_weights=(0.0, 1.0)).batch_size == 100, (
        "a bank that is never drawn does not count"
    )
    many = student("5000")
    assert (many.batch_size, many.steps, many.unlocked_blocks) == (4096, None, None)
    caplog.clear()
    own = student("300", epochs=2)
    also = "batch_size=128, unlocked_blocks=0"
    assert caplog.messages[0] == f"300 images are few: beside epochs also give {also} (docs/few-images.md)"
    assert (own.batch_size, own.steps, own.unlocked_blocks) == (300, None, None)
