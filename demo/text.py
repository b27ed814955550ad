"""What the mini LLM reads: text alone, in all words and languages, of scenes that no image ever shows.

As on the web, the same is said again and again in other words: descriptions followed by their paraphrase or
translation, lists of phrases with their translation, sentences of people who mix languages, word lists, and what
everybody knows (a tomato is red). Nothing here is ever paired with an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from demo import words
from demo.grammar import (
    Claim,
    Voice,
    draw_claim,
    long_english,
    short_chinese,
    short_english,
    short_spanish,
)
from demo.scene import COLOURS, FILLS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene, draw_scenes

CONCEPTS = (*SHAPES, *COLOURS, *SIZES, *FILLS, *GROUNDS, *TEXTURES)
NAMES = {"en": "english", "es": "español", "zh": "中文"}


def documents(*, seed: int) -> Iterator[str]:
    """Documents without end: descriptions, translations, phrase lists, word lists, facts."""
    random = Random(f"text/{seed}")
    scenes = draw_scenes("text", seed=seed)
    makers: list[Callable[[Random, Scene], str]] = [_one, _several, _phrases, _dictionary, _facts]
    while True:
        make = random.choices(makers, weights=(20, 35, 20, 5, 20))[0]
        yield " ".join(make(random, next(scenes)).split())


def _voice(random: Random) -> Voice:
    return Voice(random, unseen=True, mixing=random.choice((0.0, 0.0, 0.3, 0.6)))


def _short(random: Random, claim: Claim) -> str:
    say = random.choices((short_english, short_spanish, short_chinese), weights=(3, 2, 3))[0]
    return say(claim, _voice(random))


def _one(random: Random, scene: Scene) -> str:
    """One long description, sometimes with a short one before or after it."""
    text = long_english(scene, Voice(random, unseen=True, mixing=random.choice((0.0, 0.0, 0.3))))
    short = _short(random, draw_claim(scene, random))
    return random.choice((text, f"{short} = {text}", f"{text} = {short}"))


def _several(random: Random, scene: Scene) -> str:
    """One scene told several times over, in any words and languages: the same claim, or another one each time."""
    claim = draw_claim(scene, random)
    fresh = random.random() < 0.4
    times = range(random.randint(2, 5))
    return " = ".join(_short(random, draw_claim(scene, random) if fresh else claim) for _ in times)


def _phrases(random: Random, scene: Scene) -> str:
    """The things of a scene, each as a phrase and its equals."""
    lines = []
    for thing in scene.things:
        concepts = random.choice(([thing.colour], [thing.size, thing.colour], [thing.fill, thing.colour]))
        said = [_phrase(random, concepts, thing.shape) for _ in range(random.randint(2, 4))]
        lines.append(" = ".join(said))
    return " ; ".join(lines)


def _phrase(random: Random, adjectives: list[str], noun: str) -> str:
    voice, language = _voice(random), random.choice(("en", "en", "es", "zh"))
    feminine = noun in words.FEMININE
    said = [voice.say(a, language, feminine=feminine) for a in adjectives]
    name = voice.say(noun, language)
    if language == "es":
        return " ".join([name, *reversed(said)])
    return ("的" if language == "zh" else " ").join([*said, name])


def _names(random: Random, concept: str, count: int) -> list[str]:
    """Different names of a concept, in any language."""
    spanish = dict.fromkeys(words.SPANISH[concept].split())
    seen, unseen = words.english(concept)
    return random.sample([*seen, *unseen, *spanish, words.CHINESE[concept]], count)


def _dictionary(random: Random, scene: Scene) -> str:
    """Words and their equals."""
    lines = []
    for concept in random.sample(CONCEPTS, 6):
        one, other = _names(random, concept, 2)
        frame = random.choice(("{a} means {b}", "{a} is {b}", "{a} significa {b}", "{a}就是{b}", "{a} = {b}"))
        lines.append(frame.format(a=one, b=other))
    return " ; ".join(lines)


def _facts(random: Random, scene: Scene) -> str:
    """What everybody knows of the things of the world."""
    voice = _voice(random)
    lines = []
    for concept in random.sample(CONCEPTS, 5):
        if concept not in words.FACTS:
            continue
        language = random.choice(("en", "es", "zh"))
        thing = random.choice(words.facts(concept))[("en", "es", "zh").index(language)]
        if voice.mixing and random.random() < voice.mixing:
            thing = f" {random.choice(random.choice(words.facts(concept)))} "
        said = voice.say(concept, language)
        frames = {
            "en": ("the {t} is {c}", "{c} as the {t}", "{c} : {t}", "a {c} {t}"),
            "es": ("{t} es {c}", "{c} como {t}", "{c} : {t}", "{t} {c}"),
            "zh": ("{t}是{c}的", "像{t}一样{c}", "{c} : {t}", "{c}的{t}"),
        }
        lines.append(random.choice(frames[language]).format(t=thing, c=said))
    return " . ".join(lines)
