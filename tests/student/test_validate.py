"""The validation score: by hand, and on a bank with a picture that cannot be read."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from llm2clip.errors import LLM2CLIPError
from llm2clip.student import validate as validate_module
from llm2clip.student.validate import encode_pictures, retrieval_scores, validate

from .banks import picture_samples, write_test_bank
from .test_data import TRANSFORM


def test_scores_by_hand() -> None:
    images = torch.eye(3)
    captions = {
        "short": (torch.eye(3)[[0, 1, 2]], [0, 1, 2]),
        "long": (torch.eye(3)[[0, 2, 1, 2]], [0, 1, 2, 1]),  # sample 1 has its second caption near picture 2, too
    }
    scores = retrieval_scores(images, [0, 1, 2], captions)
    assert scores["val/short/i2t_r@1"] == scores["val/short/t2i_r@1"] == 1
    assert scores["val/long/i2t_r@1"] == pytest.approx(1 / 3)
    assert scores["val/long/t2i_r@1"] == pytest.approx(1 / 4)
    assert scores["val/r@1"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 4) / 4)


def test_a_kind_that_some_pictures_lack() -> None:
    scores = retrieval_scores(torch.eye(3), [0, 1, 2], {"zh": (torch.eye(3)[[2]], [2])})
    assert scores == {"val/zh/i2t_r@1": 1, "val/zh/t2i_r@1": 1, "val/r@1": 1}


def test_on_a_bank(tiny_llm, tiny_tower, pictures_csv, tmp_path) -> None:
    from accelerate import Accelerator

    from llm2clip.bank.build import build_bank
    from llm2clip.bank.config import BankConfig
    from llm2clip.bank.reader import Bank
    from llm2clip.student.start import open_transform, start_student

    folder = tmp_path / "pictures"
    shutil.copytree(pictures_csv.parent, folder)
    config = BankConfig(data=(str(folder / "captions.csv"),), teacher=str(tiny_llm), out=tmp_path / "bank")
    bank = Bank.open(build_bank(config))
    (folder / "003.jpg").write_bytes(b"")
    student = start_student(str(tiny_tower), teacher_dim=bank.dim, projection_dim=8).train()
    scores = validate(student, Accelerator(cpu=True), bank, open_transform(str(tiny_tower)))
    assert set(scores) == {"val/r@1", *(f"val/{kind}/{way}_r@1" for kind in bank.kinds for way in ("i2t", "t2i"))}
    assert all(0 <= score <= 1 for score in scores.values())
    assert student.training


def test_all_processes_call_the_model_equally_often(tmp_path, monkeypatch) -> None:
    """Or those that share shards would wait for each other for ever: 9 pictures, one unreadable, on 4 processes."""
    bank = write_test_bank(tmp_path / "bank", picture_samples(tmp_path / "pictures", 9))
    (tmp_path / "pictures" / "p008.png").write_bytes(b"")
    monkeypatch.setattr(validate_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(validate_module, "_all_parts", lambda parts, world: parts)
    calls, seen = [], []
    student = SimpleNamespace(
        training=False,
        eval=lambda: None,
        train=lambda mode: None,
        get_image_features=lambda pixels: calls.append(rank) or pixels.flatten(1)[:, :4].float(),
        get_text_features=lambda vectors: vectors[:, :4],
    )
    for rank in range(4):
        accelerator = SimpleNamespace(device="cpu", process_index=rank, num_processes=4, autocast=torch.no_grad)
        validate(student, accelerator, bank, TRANSFORM)
        own = range(rank, 12, 4)
        parts = encode_pictures(lambda pixels: pixels.flatten(1)[:, :4].float(), bank, own, TRANSFORM)
        seen += [sample for numbers, vectors in parts for sample in numbers if len(numbers) == len(vectors)]
    assert [calls.count(rank) for rank in range(4)] == [2, 2, 2, 2]
    assert sorted(seen) == list(range(8))


def test_a_bank_whose_pictures_are_gone(tmp_path) -> None:
    bank = write_test_bank(tmp_path / "bank", picture_samples(tmp_path / "pictures", 3))
    shutil.rmtree(tmp_path / "pictures")
    student = torch.nn.Module()
    student.get_image_features = lambda pixels: pixels.flatten(1)[:, :4].float()
    student.get_text_features = lambda vectors: vectors[:, :4]
    accelerator = SimpleNamespace(device="cpu", process_index=0, num_processes=1, autocast=torch.no_grad)
    with pytest.raises(LLM2CLIPError, match="none of its 3 pictures"):
        validate(student, accelerator, bank, TRANSFORM)
