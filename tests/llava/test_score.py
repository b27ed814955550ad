"""examples/llava: tests in their real layouts, what is asked, and how answers are scored."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image

from examples.llava.make_llava import MakeConfig, make_llava
from examples.llava.score import (
    Question,
    ScoreConfig,
    ask,
    choice_scores,
    opened,
    pope_scores,
    read_lines,
    read_tsv,
    score,
    turn,
)
from examples.llava.two_arms import write_table
from llm2clip.errors import SourceError, UsageError


@pytest.fixture(scope="module")
def llava(tiny_llm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    llm = t.AutoModelForCausalLM.from_pretrained(tiny_llm)
    with torch.no_grad():  # as it is, it says the same to everything
        for parameter in llm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    llm.save_pretrained(folder / "llm")
    t.AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(folder / "llm")
    settings = {"tower": str(tiny_tower), "llm": str(folder / "llm"), "template": "vicuna"}
    return make_llava(MakeConfig(**settings, out=folder / "made"))


def asked(*labels: str) -> list[Question]:
    return [Question(str(number), None, "", label) for number, label in enumerate(labels)]


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    """Six questions as POPE writes them, of images in two colours."""
    for colour in ("red", "blue"):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"COCO_val2014_{colour}.jpg")
    rows = [
        {"question_id": i + 1, "image": f"COCO_val2014_{('red', 'blue')[i % 2]}.jpg", "label": ("yes", "no")[i % 2]}
        | {"text": f"Is there a {'disc ' * (i + 1)}in the image?"}
        for i in range(6)
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path / "coco_pope_random.json"


def test_pope_is_read_and_asked_as_llava_does(pope: Path, llava: Path) -> None:
    config = ScoreConfig(model=llava, test="pope", data=pope, images=pope.parent)
    questions = list(read_lines(pope, pope.parent, config.suffix))
    assert len(questions) == 6 and questions[1].label == "no"
    assert questions[0].text == "Is there a disc in the image?\nAnswer the question using a single word or phrase."
    text = t.AutoProcessor.from_pretrained(llava).apply_chat_template([turn(questions[0], blind=False)])
    assert "USER: <image>\nIs there a disc" in text


def test_answers_do_not_depend_on_the_batch_and_do_on_the_image(pope: Path, llava: Path) -> None:
    """Questions of different lengths at once, and one by one."""
    settings: dict[str, Any] = {"model": llava, "test": "pope", "data": pope, "images": pope.parent, "device": "cpu"}
    questions = list(read_lines(pope, pope.parent, ""))
    together = ask(ScoreConfig(**settings, batch_size=6), questions)
    assert together == ask(ScoreConfig(**settings, batch_size=1), questions)
    assert len(together) == 6 and len(set(together)) > 1
    assert ask(ScoreConfig(**settings, blind=True), questions) != together


def test_scores_are_written_with_every_answer(pope: Path, llava: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": llava, "data": pope, "images": pope.parent, "device": "cpu"}
    found = score(ScoreConfig(**settings, test="pope", out=tmp_path / "out.json"))
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["scores"] == found and [each["label"] for each in told["answers"]] == ["yes", "no"] * 3
    answers = [each["answer"] for each in told["answers"]]
    assert found == pope_scores(asked(*["yes", "no"] * 3), answers)


def test_popes_scores_by_hand() -> None:
    labels = asked("yes", "yes", "yes", "no", "no", "no", "no", "no")
    answers = ["Yes", "Yes, there is.", "No", "No.", "There is not a dog", "yes. no", "no", "none of it"]
    # of the last two: "no" is a no, "none" is not the word no
    assert pope_scores(labels, answers) == {
        "accuracy": 5 / 8,
        "precision": 2 / 4,
        "recall": 2 / 3,
        "f1": 4 / 7,
        "yes": 4 / 8,
    }


def test_mmbench_is_read_from_its_tsv(tmp_path: Path) -> None:
    """Three options or four, a hint or none, an image or the index of the row that has it; a long cell."""
    buffer = io.BytesIO()
    Image.effect_noise((400, 300), 50).convert("RGB").save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    assert len(image) > 131_072  # the most of Python's csv, unless it is told
    rows = [
        ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "split"],
        ["7", "Which is red?", "Look.", "disc", "square", "star", "", "B", "x", image, "", "dev"],
        ["1000007", "Which is red?", "nan", "square", "star", "disc", "nan", "A", "x", "7", "", "dev"],
    ]
    (tmp_path / "dev.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    first, second = read_tsv(tmp_path / "dev.tsv")
    letter = "Answer with the option's letter from the given choices directly."
    assert first.text == f"Look.\nWhich is red?\nA. disc\nB. square\nC. star\n{letter}"
    assert second.text == f"Which is red?\nA. square\nB. star\nC. disc\n{letter}"
    assert (first.label, second.label) == ("B", "A") and first.image == second.image == buffer.getvalue()
    assert opened(first.image).size == (400, 300)
    assert choice_scores([first, second], ["B", "B"]) == {"accuracy": 0.5, "circular": 0.0}
    assert choice_scores([first, second], ["(B) square", "A."]) == {"accuracy": 1.0, "circular": 1.0}
    assert choice_scores([first, second], ["Because", "A dog"])["accuracy"] == 0.0  # words are no letters
    for answer in ("A", "a", "A:", "A) x", "A. dog", "A, a dog", "(A)", "A\nas it barks"):
        assert choice_scores([second], [answer])["accuracy"] == (answer != "a")


def test_what_cannot_be_read_is_one_line(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("index\tquestion\tA\tB\timage\n")
    with pytest.raises(SourceError, match=r"a.tsv lacks A, B, answer, image, index, question"):
        list(read_tsv(tmp_path / "a.tsv"))
    (tmp_path / "a.tsv").write_text("index\tquestion\tA\tB\timage\n1\tq\ta\tb\tx\n")
    with pytest.raises(SourceError, match=r"a.tsv lacks answer: take MMBench's dev TSV"):
        list(read_tsv(tmp_path / "a.tsv"))
    (tmp_path / "a.json").write_text('{"question_id": 1}\n')
    with pytest.raises(SourceError, match="line 1 has no question_id, image, text and label"):
        list(read_lines(tmp_path / "a.json", tmp_path, ""))
    with pytest.raises(UsageError, match="is no file"):
        score(ScoreConfig(model=llava, test="pope", data=tmp_path / "none"))
    with pytest.raises(UsageError, match="pope"):
        ScoreConfig(model=llava, test="popo", data=tmp_path)


def test_the_table_has_means_spread_and_the_constant(tmp_path: Path) -> None:
    found = {"CLIP": {"number": [0.5, 0.6], "colour": [0.2, 0.3]}, "ours": {"number": [0.7, 0.7], "colour": [0.5, 0.7]}}
    path = write_table(tmp_path, found, {"number": [0.25], "colour": [0.125]})
    assert path.read_text().splitlines() == [
        "| | number | colour | mean |",
        "|---|---|---|---|",
        "| CLIP | 55.0 ± 7.1 | 25.0 ± 7.1 | 40.0 ± 7.1 |",
        "| ours | 70.0 ± 0.0 | 60.0 ± 14.1 | 65.0 ± 7.1 |",
        "| always the commonest answer | 25.0 | 12.5 | 18.8 |",
    ]
