"""Tiny random models and images that every test folder shares; built once a session, never downloaded."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests fork, and a child waits for ever for its parent's threads
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("LLM2CLIP_TEST_GPUS", ""))

import pytest

if TYPE_CHECKING:
    from tests.loopback_hub import LoopbackHub

REQUIRED = "LLM2CLIP_TEST_REQUIRE"
"""Packages (a list with commas) whose absence stops the tests, where the tests that need them would be skipped."""


def pytest_configure(config: pytest.Config) -> None:
    """Stop where a package that must be tested is not installed."""
    names = [name for name in os.environ.get(REQUIRED, "").split(",") if name]
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise pytest.UsageError(f"{REQUIRED} asks for {', '.join(missing)}: pip install {' '.join(missing)}")


OWN_PROCESS = "LLM2CLIP_TEST_IN_ITS_OWN_PROCESS"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked `own_process` in a fresh one, and pass on what that says."""
    if pyfuncitem.get_closest_marker("own_process") is None or OWN_PROCESS in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {**os.environ, OWN_PROCESS: "1"}
    done = subprocess.run(
        command, env=environment, cwd=pyfuncitem.config.rootpath, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return True


COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220), "yellow": (230, 220, 50)}
WORDS = (
    "a an the of on in with and or is are small large red green blue yellow disc square image shows one two "
    "plain bright dark background left right top bottom corner middle shape colour this that its there drawn "
    "simple scene centre fills sits against near user ."
).split()


def write_tokenizer(folder: Path, *, extra_words: tuple[str, ...] = ()) -> None:
    """A word-level tokenizer folder with <pad>, <s>, </s>, <unk>, <mask>, as a fast transformers tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *WORDS, *extra_words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama folder (hidden 32, 2 layers) with its tokenizer, as a Hub download would lie on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP vision tower folder (32 px, patch 8, width 32, 2 layers) with its image processor."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("models") / "tiny-clip-tower"
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV (`image,short_caption,long_caption`) beside 24 small JPEGs of one coloured shape each."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("images")
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "short_caption", "long_caption"])
        for i in range(24):
            colour = list(COLOURS)[i % 4]
            shape, size = ("disc", "square")[i // 4 % 2], ("small", "large", "plain")[i // 8]
            image = Image.new("RGB", (48, 40), (30, 30, 30))
            box = (12, 8, 12 + 10 * (i // 8 + 1), 8 + 10 * (i // 8 + 1))
            draw = ImageDraw.Draw(image)
            (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=COLOURS[colour])
            image.save(folder / f"{i:03d}.jpg", quality=92)
            rows.writerow(
                [
                    f"{i:03d}.jpg",
                    f"a {size} {colour} {shape}",
                    f"this image shows a {size} {colour} {shape} on a dark background . the {shape} is {colour} .",
                ]
            )
    return folder / "captions.csv"


@pytest.fixture(scope="session")
def finished_teacher(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-way mean-pooled teacher of width 32, untrained."""
    from llm2clip.teacher.model import llm_as_encoder, save

    folder = tmp_path_factory.mktemp("finished") / "teacher"
    folder.mkdir()
    save(llm_as_encoder(tiny_llm), folder, attention="two-way")
    return folder


@pytest.fixture(scope="session")
def finished_student(tiny_tower: Path, finished_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of that teacher around the tiny tower, shared width 24, untrained, as train-student leaves it."""
    from llm2clip.teacher.fingerprint import teacher_fingerprint

    folder = tmp_path_factory.mktemp("finished") / "student"
    return write_student(tiny_tower, folder, teacher_fingerprint=teacher_fingerprint(finished_teacher))


def write_student(tower: Path, folder: Path, *, teacher_dim: int = 32, **facts: object) -> Path:
    """A random student around `tower` for teachers of that width, with a manifest that says `facts`."""
    import torch

    from llm2clip.artifacts import write_manifest
    from llm2clip.student.start import start_student
    from llm2clip.student.transform import ImageTransform

    torch.manual_seed(3)
    student = start_student(str(tower), teacher_dim=teacher_dim, projection_dim=24)
    student.save_pretrained(folder)
    ImageTransform.from_pretrained(tower).save(folder)
    write_manifest(folder, "student", config={"tower": "a/tower", "batch_size": 8}, steps=3, **facts)
    return folder


@pytest.fixture
def renames(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What was renamed, by its new name: those of its files whose bytes had not been flushed to the disk before."""
    flushed: set[tuple[int, int, int]] = set()
    seen: dict[str, list[str]] = {}
    fsync, replace = os.fsync, os.replace

    def state(facts: os.stat_result) -> tuple[int, int, int]:
        return facts.st_ino, facts.st_size, facts.st_mtime_ns  # a file that is written to later is another

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(state(os.fstat(descriptor)))

    def rename(source: Path, target: Path) -> None:
        files = (
            [path for path in Path(source).rglob("*") if path.is_file()] if Path(source).is_dir() else [Path(source)]
        )
        seen[Path(target).name] = sorted(file.name for file in files if state(file.stat()) not in flushed)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    return seen


@pytest.fixture(scope="session")
def hub_server() -> Iterator[LoopbackHub]:
    """A Hub on this machine, for the whole session; see `hub`."""
    from tests.loopback_hub import LoopbackHub

    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture
def hub(hub_server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """An empty Hub, which all libraries of this process go to, with empty caches."""
    import datasets
    from huggingface_hub import constants, hf_api

    hub_server.repositories.clear()
    hub_server.forget()
    hub_server.close_writing = False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
    template = hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub_server.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub_server.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return hub_server
