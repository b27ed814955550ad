"""A teacher pinned to a revision on the Hub stays pinned in all that is made of its banks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankAddConfig, BankConfig, BankInfoConfig, BankMergeConfig, BankVerifyConfig
from llm2clip.bank.info import bank_info
from llm2clip.bank.merge import add_to_bank, merge_banks
from llm2clip.bank.reader import Bank
from llm2clip.bank.verify import verify_bank
from llm2clip.errors import UsageError

NAME = "org/teacher"
OLD, NEW = "0" * 40, "1" * 40
"""Two commits; the branch main is at the first of them to begin with, the tags v1 and stable stay there."""


@pytest.fixture
def hub(finished_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with two commits of one teacher."""
    repository = tmp_path / "hub" / "models--org--teacher"
    shutil.copytree(finished_teacher, repository / "snapshots" / OLD)
    teacher = SentenceTransformer(str(finished_teacher), device="cpu")
    with torch.no_grad():
        teacher[0].model.norm.weight.mul_(torch.linspace(0.5, 2, 32))
    teacher.save_pretrained(str(repository / "snapshots" / NEW), create_model_card=False)
    (repository / "refs").mkdir()
    for name in ("v1", "stable", "main"):
        (repository / "refs" / name).write_text(OLD)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


Build = Callable[..., Path]


@pytest.fixture
def build_pinned(hub: Path, write_captions: Any, tmp_path: Path) -> Build:
    """Builds a bank of five captions with the teacher from the Hub, pinned to v1 unless said otherwise."""

    def build_one(name: str, first: int = 0, *, revision: str | None = "v1", teacher: str = NAME) -> Path:
        data = write_captions(tmp_path / name / "a.csv", 5, columns={"raw": 4}, first=first)
        out = tmp_path / name / "bank"
        settings = {"teacher": teacher, "teacher_revision": revision, "precision": "fp32", "device": "cpu"}
        return build_bank(BankConfig(data=(str(data),), out=out, **settings))

    return build_one


def move_main(hub: Path) -> None:
    """What an upload to the Hub does."""
    (hub / "refs" / "main").write_text(NEW)


def verify(bank: Path, **flags: Any) -> dict[str, Any]:
    return verify_bank(BankVerifyConfig(bank=bank, device="cpu", **flags))


def revision_of(bank: Path) -> str | None:
    return Bank.open(bank).manifest["teacher"]["revision"]


def test_verify_knows_the_revision(hub: Path, build_pinned: Build, capsys: pytest.CaptureFixture[str]) -> None:
    pinned, floating = build_pinned("a"), build_pinned("b", revision=None)
    move_main(hub)
    assert verify(pinned)["sample"] == 5
    assert verify(pinned, teacher=NAME)["sample"] == 5
    with pytest.raises(UsageError, match="another teacher"):
        verify(floating)
    assert verify(floating, teacher=str(hub / "snapshots" / OLD))["sample"] == 5
    capsys.readouterr()
    bank_info(BankInfoConfig(bank=pinned))
    assert f"{NAME} at v1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "second", "kept"), [("v1", "v1", "v1"), ("v1", "stable", "v1"), (None, "v1", "v1"), (None, None, None)]
)
def test_merge(
    first: str | None, second: str | None, kept: str | None, hub: Path, build_pinned: Build, tmp_path
) -> None:
    """Equal fingerprints: whatever revisions they name, it was one teacher; a pinned one can be loaded for ever."""
    banks = build_pinned("a", revision=first), build_pinned("b", 3, revision=second)
    config = BankMergeConfig(banks=banks, out=tmp_path / "merged")
    merged = merge_banks(config)
    assert revision_of(merged) == kept
    again = merge_banks(BankMergeConfig(banks=(merged, banks[0]), out=tmp_path / "again"))
    if kept:
        move_main(hub)
    assert verify(merged)["sample"] == verify(again)["sample"] == 8


def test_a_revision_goes_with_the_name(hub: Path, build_pinned: Build, tmp_path: Path) -> None:
    folder = str(hub / "snapshots" / OLD)
    pinned, local = build_pinned("a"), build_pinned("b", teacher=folder, revision=None)
    assert revision_of(merge_banks(BankMergeConfig(banks=(pinned, local), out=tmp_path / "x"))) == "v1"
    assert revision_of(merge_banks(BankMergeConfig(banks=(local, pinned), out=tmp_path / "y"))) is None


def test_add(hub: Path, build_pinned: Build, write_captions, tmp_path: Path) -> None:
    bank = build_pinned("a")
    move_main(hub)
    data = write_captions(tmp_path / "new" / "a.csv", 5, columns={"raw": 6}, first=5)
    more = add_to_bank(BankAddConfig(data=(str(data),), bank=bank, out=tmp_path / "more", device="cpu"))
    assert revision_of(more) == Bank.open(more).manifest["config"]["teacher_revision"] == "v1"
    assert verify(more)["sample"] == 10
    with pytest.raises(UsageError, match="another teacher"):
        add_to_bank(
            BankAddConfig(
                data=(str(data),), bank=bank, out=tmp_path / "x", device="cpu", teacher=NAME, teacher_revision="main"
            )
        )


def test_a_bank_begun_with_one_copy_and_ended_with_another(hub: Path, build_pinned: Build, files_of) -> None:
    bank = build_pinned("a")
    before = files_of(bank)
    (bank / "vectors" / "00000.json").unlink()
    build_pinned("a", teacher=str(hub / "snapshots" / OLD), revision=None)
    assert files_of(bank) == before
    assert verify(bank)["sample"] == 5
