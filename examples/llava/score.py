"""A LLaVA's answers to POPE, MMBench, or questions of one word, scored: `python -m examples.llava.score --help`."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from examples.llava.conversations import open_image
from examples.llava.make_llava import IMAGE, WORD, run
from examples.llava.train import open_weights
from llm2clip.artifacts import write_json
from llm2clip.config import check_choice, check_positive
from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.hub import pick_device
from llm2clip.progress import track

TESTS = ("pope", "words", "mmbench")
ONE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
OPTIONS = "ABCDEFGHI"
ROTATED = 1_000_000
"""MMBench gives a question again with its options rotated, under an index this much higher."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Ask a LLaVA the questions of a test and score its answers."""

    model: Path
    """The LLaVA: a folder that train wrote, or any that AutoModelForImageTextToText opens."""
    test: str
    """pope: yes or no, POPE's own files. words: the same layout with any word as label. mmbench: MMBench's TSV."""
    data: Path
    """The questions: JSON lines with question_id, image, text and label; or the TSV, which holds its images."""
    images: Path = Path()
    """What the images' names in JSON lines begin in."""
    out: Path | None = None
    """A JSON file for the scores and all answers."""
    suffix: str = ONE_WORD
    """What is said after each question of JSON lines; by default as LLaVA does."""
    batch_size: int = 16
    """Questions at once."""
    blind: bool = False
    """Ask without the images."""
    device: str | None = None
    """cpu, cuda, ...; by default a GPU if there is one."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            UsageError: for an impossible value.
        """
        check_choice(setting("test"), self.test, TESTS)
        check_positive(batch_size=self.batch_size)


@dataclass(frozen=True)
class Question:
    """What is asked, of which image (None: of none), and what the answer should be."""

    name: str
    image: Path | bytes | None
    text: str
    label: str


def score(config: ScoreConfig) -> dict[str, float]:
    """The scores, fractions of 1.

    Raises:
        SourceError: for questions that cannot be read.
    """
    if not config.data.is_file():
        raise UsageError(f"{setting('data')} {config.data} is no file; give the test's questions")
    read = read_tsv(config.data) if config.test == "mmbench" else read_lines(config.data, config.images, config.suffix)
    questions = list(read)
    answers = ask(config, questions)
    scores = SCORES[config.test](questions, answers)
    if config.out is not None:
        told = [{"name": q.name, "label": q.label, "answer": a} for q, a in zip(questions, answers, strict=True)]
        write_json(config.out, {"scores": scores, "answers": told})
    return scores


def read_lines(path: Path, images: Path, suffix: str) -> Iterator[Question]:
    """POPE's layout: a JSON object a line, of question_id, image, text, label.

    Raises:
        SourceError: naming the line that is none.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            yield Question(str(row["question_id"]), images / row["image"], row["text"] + suffix, str(row["label"]))
        except (ValueError, KeyError, TypeError):
            raise SourceError(
                f"{path}: line {number} has no question_id, image, text and label, as POPE's do"
            ) from None


def read_tsv(path: Path) -> Iterator[Question]:
    """MMBench's layout: index, question, hint, A to D (fewer, or more), answer, image (base64, or another's index).

    Raises:
        SourceError: if the columns or the answers are not there.
    """
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if missing := {"index", "question", "A", "B", "answer", "image"} - set(rows[0] if rows else ()):
        raise SourceError(f"{path} lacks {', '.join(sorted(missing))}: take MMBench's dev TSV (test has no answers)")
    pixels = {row["index"]: row["image"] for row in rows}
    for row in rows:
        options = [f"{letter}. {row[letter]}" for letter in OPTIONS if row.get(letter, "").strip() not in ("", "nan")]
        hint = f"{row['hint']}\n" if row.get("hint", "").strip() not in ("", "nan") else ""
        try:
            image = base64.b64decode(pixels.get(row["image"], row["image"]), validate=True)
        except binascii.Error:
            raise SourceError(f"{path}: the image of index {row['index']} is no base64") from None
        yield Question(row["index"], image, "\n".join([hint + row["question"], *options]) + LETTER, row["answer"])


@torch.inference_mode()
def ask(config: ScoreConfig, questions: Sequence[Question]) -> list[str]:
    """The model's answers, the likeliest token each time."""
    from transformers import AutoProcessor

    device = pick_device(config.device)
    model = open_weights(config.model, dtype="auto").to(device).eval()
    processor: Any = AutoProcessor.from_pretrained(config.model)
    processor.tokenizer.padding_side = "left"
    starts = range(0, len(questions), config.batch_size)
    answers: list[str] = []
    for start in track(starts, description=config.data.name, unit="batches"):
        batch = questions[start : start + config.batch_size]
        images = [] if config.blind else [opened(question.image) for question in batch if question.image is not None]
        turns = [turn(question, blind=config.blind) for question in batch]
        texts = [processor.apply_chat_template([each], add_generation_prompt=True, tokenize=False) for each in turns]
        inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        inputs = inputs.to(device, dtype=model.dtype)
        made = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]
    return answers


def turn(question: Question, *, blind: bool) -> dict[str, Any]:
    """A question as a chat template takes it."""
    seen = [] if blind or question.image is None else [{"type": "image"}]
    return {"role": "user", "content": [*seen, {"type": "text", "text": question.text.replace(IMAGE, WORD)}]}


def opened(image: Path | bytes) -> Image.Image:
    """An image in a file, or of a file's bytes."""
    return Image.open(io.BytesIO(image)).convert("RGB") if isinstance(image, bytes) else open_image(image)


def says_yes(answer: str) -> bool:
    """How LLaVA reads a yes or no: of the first sentence, no if it says "no" or "not", else yes.

    >>> says_yes("No, there is none."), says_yes("Yes"), says_yes("There is not."), says_yes("a dog")
    (False, True, False, True)
    """
    return not {"no", "not"} & set(re.findall(r"\w+", answer.split(".")[0].lower()))


def pope_scores(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy, and of "yes" precision, recall, F1, and how often it is said.

    >>> asked = [Question(str(i), None, "", label) for i, label in enumerate(["yes", "yes", "no", "no"])]
    >>> pope_scores(asked, ["Yes", "No", "Yes.", "no"])
    {'accuracy': 0.5, 'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'yes': 0.5}
    """
    pairs = [
        (question.label.lower() == "yes", says_yes(answer)) for question, answer in zip(questions, answers, strict=True)
    ]
    right, said, true = pairs.count((True, True)), sum(found for _, found in pairs), sum(label for label, _ in pairs)
    return {
        "accuracy": sum(label == found for label, found in pairs) / len(pairs),
        "precision": right / max(said, 1),
        "recall": right / max(true, 1),
        "f1": 2 * right / max(said + true, 1),
        "yes": said / len(pairs),
    }


def word_scores(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """How many answers are the label, whatever the case and the full stop.

    >>> word_scores([Question("", None, "", "red"), Question("", None, "", "two")], ["Red.", "two red"])
    {'accuracy': 0.5}
    """
    hits = [q.label.lower() == answer.lower().rstrip(".") for q, answer in zip(questions, answers, strict=True)]
    return {"accuracy": sum(hits) / len(hits)}


def choice_scores(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """How many letters are right; and of the questions, in how many all rotations (MMBench's CircularEval).

    An answer is a letter if that stands alone, or before a full stop, bracket, colon, comma or line's end.

    >>> asked = [Question("7", None, "", "A"), Question("1000007", None, "", "B"), Question("8", None, "", "C")]
    >>> choice_scores(asked, ["A", "A. a dog", "(C)"])
    {'accuracy': 0.6666666666666666, 'circular': 0.5}
    """
    rounds = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        letter = re.match(rf"\W*([{OPTIONS}])(?=[.):,\n]|$)", answer)
        rounds[int(question.name) % ROTATED].append(letter is not None and letter[1] == question.label)
    hits = [hit for each in rounds.values() for hit in each]
    return {"accuracy": sum(hits) / len(hits), "circular": sum(map(all, rounds.values())) / len(rounds)}


SCORES = {"pope": pope_scores, "words": word_scores, "mmbench": choice_scores}

if __name__ == "__main__":
    run(ScoreConfig, lambda config: json.dumps(score(config), indent=2))
