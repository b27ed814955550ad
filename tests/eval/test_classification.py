"""Zero-shot classification: both layouts, scores against plain numpy and open_clip's own loop, faults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.eval import benchmarks, classification, run
from llm2clip.eval.classification import packaged
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.named import Named, card_of
from llm2clip.eval.places import Place
from llm2clip.eval.run import evaluate
from llm2clip.parts import find_part, part_names
from tests.eval.lookalikes import image, number_in, write, write_tar
from tests.eval.test_benchmarks import fault

CLASSES = [f"thing_{chr(97 + i)}" for i in range(20)]
TEMPLATES = ["a photo of a {c}.", "the {c} here", "{c}"]
LABELS = np.random.default_rng(5).integers(0, 20, 300)


class Things:
    """An encoder of numbered images and of sentences; a class has a direction, a sentence turns it."""

    directions = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)
    turns = np.random.default_rng(2).standard_normal((4, 8)).astype(np.float32)

    def prepare_image(self, image: Any) -> int:
        return number_in(image)

    def encode_image(self, images: Sequence[int], *, batch_size: int = 32) -> np.ndarray:
        return self.directions[LABELS[list(images)]] + 1.5 * self.noise[list(images)]

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        return np.stack([self.directions[self.number(text)] + self.turns[len(text) % 4] for text in texts])

    def number(self, text: str) -> int:
        return ord(text.partition("thing ")[2][0]) - 97


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def independent(templates: Sequence[str]) -> dict[str, float]:
    """The accuracies in plain numpy."""
    model = Things()
    texts = [[template.format(c=name.replace("_", " ")) for template in templates] for name in CLASSES]
    weights = unit(np.stack([unit(model.encode_text(own)).mean(0) for own in texts]))
    scores = unit(model.encode_image(range(300))) @ weights.T
    order = np.argsort(-scores, axis=1)
    right = order[:, 0] == LABELS
    return {
        "top1": right.mean(),
        "top5": (order[:, :5] == LABELS[:, None]).any(1).mean(),
        "mean_per_class": np.mean([right[one == LABELS].mean() for one in range(20)]),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("class-folders")
    write(root, {f"{CLASSES[label]}/{i:04d}.png": image(i) for i, label in enumerate(LABELS)})
    return write(root, {"zeroshot_classification_templates.txt": "\n".join(TEMPLATES) + "\n"})


def report_of(name: str, root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(run, "open_encoder", lambda config: (Things(), {"encoder": "things"}))
    return evaluate(EvaluateConfig(model="things", benchmark=(name,), root=str(root), out=out, baseline="none"))


def test_a_folder_of_class_folders(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of("class-folders", folders, tmp_path / "report", monkeypatch)
    wanted = {f"class-folders/{key}": found for key, found in independent(TEMPLATES).items()}
    wanted |= {f"class-folders/one-template/{key}": found for key, found in independent(TEMPLATES[:1]).items()}
    assert report["metrics"] == pytest.approx(wanted)
    assert len({round(found, 6) for found in wanted.values()}) > 4, "the figures are alike: nothing is shown"
    assert 0.2 < wanted["class-folders/top1"] < 0.95
    assert report["chance"]["class-folders/top1"] == 1 / 20
    low, high = report["intervals"]["class-folders/top1"]
    assert low < wanted["class-folders/top1"] < high
    facts = report["datasets"]["class-folders"]
    assert facts["images"] == 300 and facts["classes"] == 20 and facts["templates"] == TEMPLATES
    own, other, count = facts["confused"][0]
    assert count == max(count for *_, count in facts["confused"]) and own != other
    page = (tmp_path / "report" / "report.html").read_text()
    assert f'<td class="words">{own}</td><td class="words">{other}</td>' in page
    assert "images whose class is found first" in page


def test_clip_benchmarks_tars_score_the_same(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(2):
        files = {}
        for i in range(150 * shard, 150 * shard + 150):
            files |= {f"s{i:07d}.cls": str(LABELS[i]), f"s{i:07d}.webp": image(i)}
        write_tar(tmp_path / "wds" / "test" / f"{shard}.tar", files)
    names = "\n".join(name.replace("_", " ") for name in CLASSES)
    texts = {"classnames.txt": names, "zeroshot_classification_templates.txt": "\n".join(TEMPLATES)}
    write(tmp_path / "wds", {**texts, "test/nshards.txt": "2"})
    report = report_of("class-folders", tmp_path / "wds", tmp_path / "report", monkeypatch)
    loose = report_of("class-folders", folders, tmp_path / "loose", monkeypatch)
    assert report["metrics"] == pytest.approx(loose["metrics"])
    assert "cifar10: its folder gives 300 images, the protocol has 10,000" in fault("cifar10", tmp_path / "wds")
    write(tmp_path / "wds", {"classnames.txt": "a\nb"})
    assert "and there are 2 names; they are of another set" in fault("class-folders", tmp_path / "wds")
    write_tar(tmp_path / "wds" / "test" / "0.tar", {"a.webp": image(0)})
    assert "0.tar: a is no image beside a .cls" in fault("class-folders", tmp_path / "wds")


def test_faults_of_folders_are_told(folders: Path, tmp_path: Path) -> None:
    write(tmp_path, {"cat/1.png": image(1), "dog/readme.txt": "x"})
    assert "/dog holds no image" in fault("class-folders", tmp_path)
    write(tmp_path, {"dog/1.png": image(1), "classnames.txt": "cat\ndog\nbird"})
    assert "3 class names for 2 folders" in fault("class-folders", tmp_path)
    write(tmp_path, {"classnames.txt": "cat\ndog", "zeroshot_classification_templates.txt": "a photo of {}"})
    assert "template 'a photo of {}' has no {c}" in fault("class-folders", tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "zeroshot_classification_templates.txt").unlink()
    assert "/empty holds no image" in fault("class-folders", tmp_path)
    (tmp_path / "empty").rmdir()
    assert Named("class-folders", tmp_path).told()["found"][0].startswith("there are no templates beside it")


def test_names_and_templates_come_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("clip_benchmark", reason="pip install 'llm2clip[metrics]'")
    assert len(packaged("en_classnames.json", "imagenet1k") or ()) == 1000
    assert len(packaged("en_zeroshot_classification_templates.json", "imagenet1k") or ()) == 80
    assert packaged("en_classnames.json", "nothing") is None
    write(tmp_path, {f"n{i:08d}/1.png": image(i) for i in range(1000)})
    assert "its folder gives 1,000 images, the protocol has 50,000" in fault("imagenet1k", tmp_path)
    monkeypatch.setattr(classification.importlib.util, "find_spec", lambda name: None)
    assert "add classnames.txt, or pip install 'llm2clip[metrics]'" in fault("imagenet1k", tmp_path)


@pytest.mark.ci
def test_accuracy_equals_open_clips_own_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model of open_clip on a folder of twenty classes."""
    open_clip = pytest.importorskip("open_clip", reason="pip install 'llm2clip[metrics]'")
    from llm2clip.data.images import load_image

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, vision, text).eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    generator = np.random.default_rng(0)
    from PIL import Image

    for i in range(100):
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        (tmp_path / "set" / CLASSES[i % 20]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "set" / CLASSES[i % 20] / f"{i}.png")

    def pixels_of(one: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(load_image(one))).permute(2, 0, 1).float() / 255

    class Theirs(Things):
        def prepare_image(self, image: Any) -> Any:
            return pixels_of(image)

        @torch.no_grad()
        def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
            return model.encode_image(torch.stack(list(images)), normalize=True).numpy()

        @torch.no_grad()
        def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
            return model.encode_text(tokenizer(list(texts)), normalize=True).numpy()

    monkeypatch.setattr(run, "open_encoder", lambda config: (Theirs(), {"encoder": "open_clip"}))
    write(tmp_path / "set", {"zeroshot_classification_templates.txt": "\n".join(TEMPLATES)})
    options: dict[str, Any] = {"model": "x", "benchmark": ("class-folders",), "root": str(tmp_path / "set")}
    report = evaluate(EvaluateConfig(**options, out=tmp_path / "report", baseline="none"))
    names = [name.replace("_", " ") for name in CLASSES]
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, names, [t.replace("{c}", "{}") for t in TEMPLATES])
    hits = {1: 0, 5: 0}
    for i in range(100):
        with torch.no_grad():
            file = tmp_path / "set" / CLASSES[i % 20] / f"{i}.png"
            logits = 100.0 * model.encode_image(pixels_of(file)[None], normalize=True) @ weights
        for k in hits:
            hits[k] += int(i % 20 in logits.topk(k).indices[0].tolist())
    assert report["metrics"]["class-folders/top1"] == pytest.approx(hits[1] / 100)
    assert report["metrics"]["class-folders/top5"] == pytest.approx(hits[5] / 100)
    assert hits[5] > hits[1]


def test_a_text_encoder_alone_gets_no_accuracy(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Texts:
        encode_text = Things.encode_text

    monkeypatch.setattr(run, "open_encoder", lambda config: (Texts(), {"encoder": "text encoder"}))
    config = EvaluateConfig(teacher="t", benchmark=("class-folders",), root=str(folders), out=tmp_path / "report")
    report = evaluate(config)
    assert report["metrics"] == {}
    assert "scored on captions alone, and this benchmark takes images" in json.dumps(report["datasets"])


def test_the_command_line_scores_a_student_and_its_baseline(
    finished_student: Path, finished_teacher: Path, images_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags, a real student with its teacher, classes of drawn images, and how it differs from itself."""
    from llm2clip import LLM2CLIP, cli
    from llm2clip.bundle import save_bundle

    model = LLM2CLIP.from_pretrained(finished_student, finished_teacher, device="cpu")
    (tmp_path / "bundle").mkdir()
    save_bundle(tmp_path / "bundle", model.student, model.transform, model.teacher, prompt=model.prompt)
    for i, file in enumerate(sorted(images_csv.parent.glob("*.jpg"))):
        write(tmp_path / "set", {f"{('red', 'green', 'blue', 'yellow')[i % 4]}/{file.name}": file.read_bytes()})
    flags = f"--benchmark class-folders --root {tmp_path / 'set'} --cache {tmp_path / 'cache'} --device cpu"
    flags += f" --model {finished_student} --teacher {finished_teacher} --baseline {tmp_path / 'bundle'}"
    assert cli.run(["evaluate", *flags.split(), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    names = [f"a photo of a {name}." for name in ("blue", "green", "red", "yellow")]
    images = model.encode_image(sorted((tmp_path / "set").rglob("*.jpg")))
    best = (images @ model.encode_text(names).T).argmax(1)
    assert report["metrics"]["class-folders/one-template/top1"] == (best == np.repeat(np.arange(4), 6)).mean()
    assert report["baseline"]["differences"]["class-folders/top1"]["p"] == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert cli.run(["evaluate", "--list"]) == 0 and "xm3600-first" in capsys.readouterr().out
    assert cli.run(["evaluate", "--benchmark", "docci", "--root", str(tmp_path), *flags.split()[-6:]]) == 2
    assert "there is no --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in part_names(benchmarks) if card_of(name).captions == {}])
def test_the_package_has_templates_for_every_set_it_knows(name: str, tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark", reason="pip install 'llm2clip[metrics]'")
    place = Place(write(tmp_path, {"thing/1.png": image(1)}), name, ())
    found = find_part(benchmarks, name, "read")(place)
    assert found.names == ["thing"]
    assert bool(place.notes) == (name == "class-folders"), place.notes


def test_other_images_are_another_benchmark(tmp_path: Path) -> None:
    """Of class folders and tars, too, where nothing but the place of an image names it."""
    found = []
    for number in (0, 1, 1):
        root = write(tmp_path / f"{len(found)}", {f"cat/{number}.png": image(1), "dog/1.png": image(2)})
        found.append(Named("class-folders", root).fingerprint)
    for number in (0, 1, 1):
        root = write(tmp_path / f"{len(found)}", {"classnames.txt": "cat"})
        write_tar(root / "test" / "0.tar", {"a.cls": "0", "a.png": image(1) + bytes(number)})
        found.append(Named("class-folders", root).fingerprint)
    assert [found.index(one) for one in found] == [0, 1, 1, 3, 4, 4]
