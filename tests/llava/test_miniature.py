"""examples/llava: the miniature's questions are right and fair, and the whole of it runs."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import transformers as t

from demo.scene import COLOURS, SHAPES, draw_scenes
from examples.llava.conversations import read_conversations
from examples.llava.miniature import ASKED, NUMBERS, TRAINED, MiniatureConfig, make_llm, miniature, question, write_data


def test_answers_are_right_and_spread() -> None:
    random, found = Random(0), {kind: Counter() for kind in ASKED}
    for scene in islice(draw_scenes("test", seed=0), 300):
        for kind in ASKED:
            for x, answer in question(kind, scene, random):
                found[kind][answer] += 1
                words = set(x.split())
                fitting = [
                    thing
                    for thing in scene.things
                    if words & {*SHAPES} <= {thing.shape} and words & {*COLOURS} <= {thing.colour}
                ]
                if kind == "number":
                    assert NUMBERS.index(answer) == len(fitting)
                elif kind == "colour":
                    assert [thing.colour for thing in fitting] == [answer]
                else:
                    assert (answer == "yes") == bool(fitting)
                    assert len(words) == 2 and words & {thing.colour for thing in scene.things}
                    assert words & {thing.shape for thing in scene.things}
    assert set(found["colour"]) == set(COLOURS) and set(found["number"]) == set(NUMBERS)
    assert abs(found["exists"]["yes"] - found["exists"]["no"]) < 60
    assert max(found["number"].values()) < 0.45 * found["number"].total()


def test_a_scene_has_as_many_colour_questions_as_shapes_that_are_there_once() -> None:
    for scene in islice(draw_scenes("test", seed=1), 40):
        shapes = Counter(thing.shape for thing in scene.things)
        once = {(thing.shape, thing.colour) for thing in scene.things if shapes[thing.shape] == 1}
        asked = question("colour", scene, Random(0), most=3)
        assert len(asked) == len({*asked}) == min(3, len(once)) and {*asked} <= once
        assert len(question("colour", scene, Random(0))) == min(1, len(once))


def test_the_tests_wordings_are_new_but_their_words_are_known(tmp_path: Path) -> None:
    for kind, frame in ASKED.items():
        assert frame not in TRAINED[kind]
        assert set(frame.split()) <= {
            word for frames in TRAINED.values() for each in frames for word in each.split()
        } | {"the"}
    llm = make_llm(tmp_path / "llm")
    tokenizer = t.AutoTokenizer.from_pretrained(llm)
    frames = [each for kind in ASKED for each in (*TRAINED[kind], ASKED[kind])]
    text = " ".join([*frames, *NUMBERS, *COLOURS, *SHAPES, "yes no shapes"]).replace("{x}", "")
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == ["<s>", *text.split()]
    assert t.AutoModelForCausalLM.from_pretrained(llm).get_input_embeddings().num_embeddings == len(tokenizer)


def test_the_data_are_in_llavas_and_popes_layouts(tmp_path: Path) -> None:
    write_data(tmp_path, MiniatureConfig(out=tmp_path, captions=3, scenes=5, test=4), seed=0)
    captions = read_conversations(tmp_path / "captions.json", tmp_path)
    questions = read_conversations(tmp_path / "questions.json", tmp_path)
    assert [len(each.images) for each in captions + questions] == [1] * 8
    assert all(each.messages[0]["content"].startswith("<image>\n") for each in captions + questions)
    assert {len(each.messages) for each in questions} <= {4, 6, 8, 10}  # number, exists, and up to three colours
    for each in questions:
        assert len(asked := {turn["content"] for turn in each.messages[::2]}) == len(each.messages) / 2, asked
    for kind, frame in ASKED.items():
        rows = [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        assert len(rows) == 4 and all((tmp_path / row["image"]).is_file() for row in rows)
        assert all(row["text"].startswith(frame.split("{")[0]) for row in rows)


@pytest.mark.ci
def test_one_seed_at_its_smallest(finished_student: Path, tmp_path: Path) -> None:
    (tmp_path / "demo" / "seed-0" / "models").mkdir(parents=True)
    (tmp_path / "demo" / "seed-0" / "models" / "D-all").symlink_to(finished_student)
    small = {"captions": 16, "scenes": 32, "test": 4, "batch_size": 16}
    config = MiniatureConfig(out=tmp_path / "out", demo=tmp_path / "demo", **small)
    lines = miniature(config).read_text().splitlines()
    assert lines[0] == "| | number | colour | exists | mean |"
    rows = [line.split("|")[1].strip() for line in lines[2:]]
    assert rows == ["CLIP", "student", "blind (no image)", "always the commonest answer"]
    assert miniature(config).read_text().splitlines() == lines  # nothing is done again
    arms = tmp_path / "out" / "seed-0"
    logs = [
        json.loads((arms / arm / stage / "manifest.json").read_text())["log"]
        for arm in ("CLIP", "student")
        for stage in "12"
    ]
    assert [len(log) for log in logs] == [1, 2, 1, 2]
    assert not (arms / "blind" / "1").exists()
    settings = json.loads((arms / "student" / "2" / "manifest.json").read_text())["config"]
    assert (settings["seed"], settings["learning_rate"], settings["blind"]) == (0, config.rates[1], False)
