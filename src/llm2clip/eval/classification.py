"""Zero-shot classification: an image's class is that whose name, in a sentence, is nearest; and how sets are read."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from llm2clip.data.files import IMAGE_ENDINGS
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.data.tars import Tar
from llm2clip.errors import SourceError, UsageError
from llm2clip.eval.annotations import IMAGES, Row, members_of
from llm2clip.eval.places import Place
from llm2clip.eval.ranking import mean_per_class, score_of
from llm2clip.metrics import best_columns, match
from llm2clip.protocols import Encoder, Score

ONE = ("a photo of a {c}.",)
"""The sentence of the scores with one template."""
CONFUSED = 20
"""Pairs of classes that are told of."""
SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Labelled:
    """A classification set: its images with the number of their class.

    Attributes:
        rows: the images.
        labels: the number of each one's class in `names`.
        names: of the classes.
        templates: the usual sentences, with {c} for the name.
    """

    rows: Sequence[Row]
    labels: Sequence[int]
    names: Sequence[str]
    templates: Sequence[str]


class ZeroShot:
    """Top-1, top-5 and mean-per-class accuracy with the usual templates, and with one.

    Args:
        samples: the images.
        found: their classes.
    """

    def __init__(self, samples: Sequence[Sample], found: Labelled) -> None:
        self.samples, self.found = samples, found
        self.confused: list[tuple[str, str, int]] = []
        """After a run: class, what it is taken for, how many images of it."""

    def run(self, encoder: Encoder) -> Iterator[Score]:
        """The accuracies; a tie counts against the model."""
        _, images = encoder.images(self.samples)
        labels, num_classes = np.array(self.found.labels), len(self.found.names)
        for prefix, templates in (("", self.found.templates), ("one-template/", ONE)):
            classes = self._classes(templates, encoder)
            ranks = match(images, classes, labels, np.arange(num_classes), both=False).ranks
            if not prefix:
                self._note_confused(best_columns(images, classes, 1)[0][:, 0], labels)
            hits = (ranks <= 1).astype(float)
            yield score_of(f"{prefix}top1", (hits, np.ones(len(hits))), 1 / num_classes)
            yield score_of(f"{prefix}top5", ((ranks <= 5).astype(float), np.ones(len(hits))))
            yield score_of(f"{prefix}mean_per_class", mean_per_class(hits, labels))

    def sentences(self, templates: Sequence[str]) -> list[str]:
        """Those that are asked for with `templates`, class by class."""
        return [template.format(c=name) for name in self.found.names for template in templates]

    def _classes(self, templates: Sequence[str], encoder: Encoder) -> Tensor:
        """[classes, D]: the mean over the sentences of a class."""
        vectors = normalize(encoder.texts(self.sentences(templates)).float(), dim=-1)
        return vectors.reshape(len(self.found.names), len(templates), -1).mean(1)

    def _note_confused(self, best: np.ndarray, labels: np.ndarray) -> None:
        pairs = Counter((int(a), int(b)) for a, b in zip(labels, best, strict=True) if a != b)
        names = self.found.names
        self.confused = [(names[a], names[b], count) for (a, b), count in pairs.most_common(CONFUSED)]


def read_labelled(place: Place, key: str = "") -> Labelled:
    """A set in CLIP_benchmark's tars, or a folder of class folders.

    Args:
        place: its folder.
        key: what CLIP_benchmark's package calls it, for class names and templates that do not lie beside the images.
    """
    if paths := place.paths("test/*.tar", "*.tar"):
        return _of_tars(place, paths, key)
    folders = sorted(path for path in place.folder.iterdir() if path.is_dir())
    inside = {path: [file for file in sorted(path.rglob("*")) if _is_image(file)] for path in folders}
    if not any(inside.values()):
        raise place.absent()
    if empty := next((path for path, files in inside.items() if not files), None):
        raise SourceError(f"{place.name}: {empty} holds no image; take it away, or fetch its images")
    rows = [
        Row(ImageRef(str(file.resolve())), {}, str(file.relative_to(place.folder)))
        for files in inside.values()
        for file in files
    ]
    labels = [number for number, files in enumerate(inside.values()) for _ in files]
    return Labelled(rows, labels, _names(place, [path.name for path in folders], key), _templates(place, key))


def _of_tars(place: Place, paths: Sequence[Path], key: str) -> Labelled:
    """CLIP_benchmark's layout: an image beside a .cls with the number of its class; names and templates beside."""
    rows, labels = [], []
    for path in paths:
        tar = Tar(str(path.resolve()))
        for name, members in members_of(tar):
            image, where = next((members[e] for e in IMAGES if e in members), None), f"{path.name}: {name}"
            text = tar.text(members["cls"]).decode("utf-8", "replace").strip() if "cls" in members else ""
            if image is None or not text.isdecimal():
                raise SourceError(
                    f"{where} is no image beside a .cls with the number of its class; fetch the tar again"
                )
            rows.append(Row(tar.locate(image), {}, where))
            labels.append(int(text))
    names = _names(place, [], key)
    if (most := max(labels, default=0)) >= len(names):
        where = rows[labels.index(most)].where
        raise SourceError(f"{where} is of class {most}, and there are {len(names)} names; they are of another set")
    return Labelled(rows, labels, names, _templates(place, key))


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_ENDINGS and not path.name.startswith(".")


def _names(place: Place, folders: Sequence[str], key: str) -> list[str]:
    """Class names: the set's own classnames.txt, else the package's, else those of the folders."""
    names: list[str] | None = None
    if text := place.text("classnames.txt"):
        names = [line.strip() for line in text.lines() if line.strip()]
    elif key and (not folders or all(SYNSET.fullmatch(name) for name in folders)):
        names = packaged("en_classnames.json", key)
    elif folders:
        names = [re.sub(r"[_-]+", " ", name).strip() for name in folders]
    if names is None:
        raise UsageError(
            f"{place.name}: there are no class names: add classnames.txt, or pip install 'llm2clip[metrics]'"
        )
    if folders and len(names) != len(folders):
        raise SourceError(
            f"{place.name}: {len(names):,} class names for {len(folders):,} folders; they are of another set"
        )
    return names


def _templates(place: Place, key: str) -> list[str]:
    """The usual sentences of a set; of one that has none "a photo of a ..." alone, which is said."""
    if text := place.text("zeroshot_classification_templates.txt"):
        found = [line.strip() for line in text.lines() if line.strip()]
    else:
        plain = key.removesuffix("vtab").rstrip("_")  # VTAB's variant of a set has no sentences of its own
        found = packaged("en_zeroshot_classification_templates.json", plain) or []
        if not found:
            place.note(
                f"there are no templates beside it (with the extra metrics a known set has some): {ONE[0]!r} alone"
            )
            found = list(ONE)
    if bad := next((template for template in found if "{c}" not in template), None):
        raise SourceError(f"{place.name}: the template {bad!r} has no {{c}} for the class")
    return found


def packaged(file: str, key: str) -> list[str] | None:
    """What CLIP_benchmark's package lists for a set; None where it is not installed or does not know it."""
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], "datasets", file)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return list(found[key]) if key in found else None
