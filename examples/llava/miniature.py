"""The comparison in small: scenes with questions, the mini LLM, the mini CLIP's tower against its student's.

`python -m examples.llava.miniature --out DIR --seeds 3`. Questions are of how many, what colour, and whether there is;
scenes and wordings of the tests are none of the training's.
README.md says what came out.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from demo.config import BUDGETS
from demo.images import draw_image
from demo.run import SHIPPED
from demo.scene import COLOURS, SHAPES, Scene, draw_scenes
from demo.write import captioned
from examples.llava.make_llava import run
from examples.llava.two_arms import ArmsConfig, compare, write_table
from llm2clip.artifacts import read_json, write_json
from llm2clip.errors import UsageError
from llm2clip.progress import track

logger = logging.getLogger("llm2clip")
NUMBERS = ("none", "one", "two", "three", "four", "five")
TRAINED = {
    "number": ("how many {x} are there", "count the {x}", "tell how many {x} you see"),
    "colour": ("what colour is the {x}", "name the colour of the {x}", "the {x} is of what colour"),
    "exists": ("is there a {x}", "do you see a {x}", "is a {x} in the image"),
}
"""Wordings of the questions in training, by kind."""
ASKED = {
    "number": "how many {x} do you see",
    "colour": "what is the colour of the {x}",
    "exists": "in the image is there a {x}",
}
"""And in the tests: the same words, put otherwise."""
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + ' = ' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class MiniatureConfig:
    """LLaVA's two stages and a test on drawn scenes, with the towers of the mini CLIP and of its student."""

    out: Path
    """Folder of everything; OUT/table.md is the table."""
    seeds: int = 1
    """Runs, with seeds 0, 1, ...: of the students too, and of all data."""
    demo: Path | None = None
    """A folder of `llm2clip demo` with as many seeds, whose students are taken; by default they are made."""
    captions: int = 960
    """Images of stage 1, a short caption each."""
    scenes: int = 5000
    """Images of stage 2, with questions of each kind."""
    test: int = 200
    """Questions of each kind in the test."""
    batch_size: int = 8
    """Conversations a step, in both stages."""
    rates: tuple[float, float] = (2e-3, 7e-4)
    """The peaks of stages 1 and 2."""


def miniature(config: MiniatureConfig) -> Path:
    """Run what is missing and write the table; returns it."""
    llm, found = make_llm(config.out / "llm"), {}
    for seed in range(config.seeds):
        folder = config.out / f"seed-{seed}"
        write_data(folder / "data", config, seed)
        student = make_tower(config.demo or config.out / "demo", folder / "tower", seed)
        how = {"batch_size": config.batch_size, "micro_batch_size": config.batch_size, "workers": 0}
        how |= {"gradient_checkpointing": 0, "save_every": 100}
        rates = [{"learning_rate": rate} for rate in config.rates]
        data = folder / "data"
        settings = ArmsConfig(
            arms={"CLIP": str(SHIPPED / "clip"), "student": str(student)},
            llm=str(llm),
            dtype="float32",
            template=str(llm / "template"),
            captions=(data / "captions.json", data),
            instructions=(data / "questions.json", data),
            tests={kind: ("words", data / f"{kind}.jsonl", data) for kind in ASKED},
            out=config.out,
            seed=seed,
            suffix="",
            stage_1=how | rates[0],
            stage_2=how | rates[1],
        )
        compare(settings)
        for arm, scores in read_json(config.out / "results.json").items():
            for kind, values in scores.items():
                found.setdefault(arm, {}).setdefault(kind, []).extend(values)
    *_, least = found
    return write_table(config.out, {arm: scores for arm, scores in found.items() if arm != least}, found[least])


def make_llm(folder: Path) -> Path:
    """The mini LLM with the words of the questions that it lacks, and a chat template beside it."""
    from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "template").exists():
        llm = AutoModelForCausalLM.from_pretrained(SHIPPED / "llm", dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "llm")
        frames = [frame for kind in ASKED for frame in (*TRAINED[kind], ASKED[kind])]
        words = {word for frame in frames for word in frame.split() if word != "{x}"} | {
            *NUMBERS,
            "yes",
            "no",
            "shapes",
        }
        new = sorted(words - set(tokenizer.get_vocab()))
        tokenizer.add_tokens([AddedToken(word, single_word=True) for word in new])  # no part of another word
        llm.resize_token_embeddings(len(tokenizer))
        llm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "template").write_text(TEMPLATE, encoding="utf-8")
    return folder


def make_tower(demo: Path, out: Path, seed: int) -> Path:
    """The tower of the demo's student, arm D; teacher, bank and student are made if they are not there."""
    from demo import arms
    from llm2clip import ExportConfig, export_model

    folder, budget = demo / f"seed-{seed}", BUDGETS["small"]
    student = folder / "models" / "D-all"
    if not (student / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        arms.write_tars(folder / "data" / "train", budget.train, seed=seed)
        arms.make_tower(SHIPPED / "clip", folder / "tower")
        arms.make_teacher(folder, SHIPPED / "llm", budget, seed, share="all", tuning="lora")
        arms.make_bank(folder, teacher="lora-all", share="all", out="D-all")
        arms.make_student(folder, folder / "tower", budget, seed, arm="D", bank="D-all", share="all")
    return export_model(ExportConfig(model=str(student), to="tower", out=out))


def write_data(folder: Path, config: MiniatureConfig, seed: int) -> None:
    """Captions and questions in LLaVA's JSON, tests in POPE's lines, and the images of all."""
    amounts = {"captions": config.captions, "scenes": config.scenes, "test": config.test}
    if (folder / "amounts.json").exists():
        if (found := read_json(folder / "amounts.json")) != amounts:
            raise UsageError(f"{folder} was made with {found}, now it is {amounts}; name a new folder")
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random, rows = Random(f"llava/{seed}"), []
    for i, sample in enumerate(captioned("train", config.captions, seed=seed, kinds=("short",))):
        rows.append(conversation(folder, f"caption-{i}", sample.scene, [("", sample.captions["short"][0])]))
    (folder / "captions.json").write_text(json.dumps(rows), encoding="utf-8")
    rows = []
    scenes = islice(draw_scenes("train", seed=seed + 1000), config.scenes)
    for i, scene in enumerate(track(scenes, description="questions", unit="images", total=config.scenes)):
        asked = [(kind, x, y) for kind in TRAINED for x, y in question(kind, scene, random, most=3)]
        random.shuffle(asked)
        turns = [(random.choice(TRAINED[kind]).format(x=x), y) for kind, x, y in asked]
        rows.append(conversation(folder, f"question-{i}", scene, turns))
    (folder / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    for kind in ASKED:
        lines: list[str] = []
        for scene in draw_scenes("test", seed=seed):
            for x, label in question(kind, scene, random):
                name = f"images/{kind}-{len(lines)}.png"
                draw_image(scene, seed=len(lines)).save(folder / name)
                asked = {"question_id": len(lines), "image": name, "text": ASKED[kind].format(x=x), "label": label}
                lines.append(json.dumps(asked) + "\n")
            if len(lines) == config.test:
                break
        (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(folder / "amounts.json", amounts)  # last: all is there


def conversation(folder: Path, name: str, scene: Scene, turns: list[tuple[str, str]]) -> dict[str, object]:
    """A sample of LLaVA's JSON; its image is drawn."""
    path = f"images/{name}.png"
    draw_image(scene, seed=int(name.split("-")[1])).save(folder / path)
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": name, "image": path, "conversations": said}


def question(kind: str, scene: Scene, random: Random, *, most: int = 1) -> list[tuple[str, str]]:
    """What a question of a kind is about, and its answer; nothing where a scene has no such question.

    Of colours, which tell nothing of each other, it is up to `most` questions.

    Every number that a scene offers is as likely, and so are yes and no; what is not there has the colour of one thing
    and the shape of another.
    """
    shapes = Counter(thing.shape for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    if kind == "number":
        counts = {
            f"{name} shapes": both[name] for both, names in ((shapes, SHAPES), (colours, COLOURS)) for name in names
        }
        counts["shapes"] = len(scene.things)
        number = random.choice(sorted(set(counts.values())))
        return [(random.choice([x for x, count in counts.items() if count == number]), NUMBERS[number])]
    if kind == "colour":
        single = [thing for thing in scene.things if shapes[thing.shape] == 1]
        return [(thing.shape, thing.colour) for thing in random.sample(single, min(most, len(single)))]
    there = {(thing.colour, thing.shape) for thing in scene.things}
    absent = sorted({(colour, shape) for colour in colours for shape in shapes} - there)
    chosen, label = (random.choice(sorted(there)), "yes") if not absent or random.random() < 0.5 else (None, "no")
    return [(" ".join(chosen or random.choice(absent)), label)]


if __name__ == "__main__":
    run(MiniatureConfig, miniature)
