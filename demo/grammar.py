"""Captions of scenes: long English ones, short ones in English, Spanish and Chinese; a voice picks the words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo import words
from demo.scene import GRID, Scene, Thing

LONG_WORDS = (77, 90)
"""Fewest words of a long caption, drawn from this range; the last sentence may add a few."""


@dataclass(frozen=True)
class Voice:
    """Which words a speaker has.

    Attributes:
        seen: uses the English words and wordings of training captions.
        unseen: uses those that come in text only. With both, any.
        mixing: how often a concept is said in another language than the sentence's (code-switching).
    """

    random: Random
    seen: bool = True
    unseen: bool = False
    mixing: float = 0.0

    def _pick(self, options: tuple[list[str], list[str]]) -> str:
        seen, unseen = options
        allowed = (seen if self.seen else []) + (unseen if self.unseen else [])
        return self.random.choice(allowed or seen)

    def say(self, concept: str, language: str = "en", *, feminine: bool = False) -> str:
        """A word for the concept in the language, or by `mixing` in another."""
        if self.mixing and self.random.random() < self.mixing:
            language = self.random.choice(("en", "es", "zh"))
            return f" {self._word(concept, language, feminine=feminine)} "
        return self._word(concept, language, feminine=feminine)

    def _word(self, concept: str, language: str, *, feminine: bool) -> str:
        if language == "es":
            forms = words.SPANISH[concept].split()
            return forms[-1] if feminine else forms[0]
        if language == "zh":
            return words.CHINESE[concept]
        return self._pick(words.english(concept))

    def phrase(self, entry: str) -> str:
        """One of an entry's English phrases that this voice has."""
        return self._pick(words.phrases(entry))

    def frame(self, seen: list[str], unseen: list[str]) -> str:
        """One of the sentence frames that this voice has."""
        return self._pick((seen, unseen))


def place(thing: Thing) -> str:
    """The quarter of the image the thing lies in."""
    rows = "top" if thing.row < GRID // 2 else "bottom"
    return f"{rows} {'left' if thing.column < GRID // 2 else 'right'}"


def relation(one: Thing, other: Thing) -> str:
    """How `one` lies to `other`: by column, or by row if they share the column."""
    if one.column != other.column:
        return "left" if one.column < other.column else "right"
    return "above" if one.row < other.row else "below"


@dataclass(frozen=True)
class Claim:
    """What a short caption says of an image: two things, each in part, and how they lie or what is behind them.

    Attributes:
        one, other: attribute -> its value ("colour" -> "red"), in the order English says them.
        behind: "ground", "texture" or both, with their values; empty if the relation is told.
        relation: how `one` lies to `other`; empty if the background is told.
    """

    one: dict[str, str]
    other: dict[str, str]
    behind: dict[str, str]
    relation: str

    def holds(self, scene: Scene) -> bool:
        """Whether the claim is true of a scene."""
        if any(getattr(scene, name) != value for name, value in self.behind.items()):
            return False
        ones = [thing for thing in scene.things if _is(thing, self.one)]
        others = [thing for thing in scene.things if _is(thing, self.other)]
        pairs = [(a, b) for a in ones for b in others if a is not b]
        return any(not self.relation or relation(a, b) == self.relation for a, b in pairs)


def _is(thing: Thing, attributes: dict[str, str]) -> bool:
    return all(getattr(thing, name) == value for name, value in attributes.items())


def draw_claim(scene: Scene, random: Random) -> Claim:
    """Something to say of the two salient things of a scene."""
    one, other = random.sample(scene.things[:2], 2)
    names = random.choice((["relation"], ["ground"], ["texture", "ground"]))
    behind = {name: getattr(scene, name) for name in names if name != "relation"}
    return Claim(_part(one, random), _part(other, random), behind, "" if behind else relation(one, other))


def _part(thing: Thing, random: Random) -> dict[str, str]:
    extra = random.choice((["size"], ["fill"], ["size", "fill"]))
    return {name: getattr(thing, name) for name in [*extra, "colour", "shape"]}


def short_english(claim: Claim, voice: Voice) -> str:
    """The claim in English, six to fifteen words or so."""
    first, second = (" ".join(voice.say(value) for value in part.values()) for part in (claim.one, claim.other))
    behind = " ".join(voice.say(value) for value in claim.behind.values())
    if claim.relation:
        between = voice.phrase(words.RELATIONS[claim.relation])
        return voice.frame(RELATED, RELATED_UNSEEN).format(a=first, b=second, rel=between)
    return voice.frame(BEFORE, BEFORE_UNSEEN).format(a=first, b=second, behind=behind)


RELATED = ["a {a} {rel} a {b}", "there is a {a} {rel} a {b}", "{a} {rel} {b}"]
RELATED_UNSEEN = ["you see one {a} {rel} one {b}", "look : one {a} stays {rel} that {b}"]
BEFORE = [
    "a {a} and a {b} on {behind}",
    "{a} , {b} , {behind} background",
    "a {a} with a {b} on a {behind} background",
    "on {behind} : a {a} and a {b}",
]
BEFORE_UNSEEN = ["one {a} together with one {b} upon {behind}", "{behind} backdrop showing one {a} beside one {b}"]


def short_spanish(claim: Claim, voice: Voice) -> str:
    """The claim in Spanish, adjectives after the noun and agreeing with it."""

    def named(part: dict[str, str]) -> str:
        feminine = part["shape"] in words.FEMININE
        *adjectives, shape = part.values()
        said = " ".join(voice.say(a, "es", feminine=feminine) for a in reversed(adjectives))
        return f"{'una' if feminine else 'un'} {voice.say(shape, 'es')} {said}"

    first, second = named(claim.one), named(claim.other)
    behind = " ".join(voice.say(value, "es") for value in reversed(claim.behind.values()))
    if claim.relation:
        return voice.random.choice(RELATED_ES).format(a=first, b=second, rel=words.RELATIONS_ES[claim.relation])
    return voice.random.choice(BEFORE_ES).format(a=first, b=second, behind=behind)


RELATED_ES = ["{a} {rel} {b}", "hay {a} {rel} {b}"]
BEFORE_ES = ["{a} y {b} sobre fondo {behind}", "hay {a} con {b} en un fondo {behind}", "{a} , {b} , fondo {behind}"]


def short_chinese(claim: Claim, voice: Voice) -> str:
    """The claim in Chinese."""

    def named(part: dict[str, str]) -> str:
        *adjectives, shape = part.values()
        return "的".join(voice.say(a, "zh") for a in adjectives) + voice.say(shape, "zh")

    first, second = named(claim.one), named(claim.other)
    behind = "的".join(voice.say(value, "zh") for value in claim.behind.values())
    if claim.relation:
        return voice.random.choice(RELATED_ZH).format(a=first, b=second, rel=words.RELATIONS_ZH[claim.relation])
    return voice.random.choice(BEFORE_ZH).format(a=first, b=second, behind=behind)


RELATED_ZH = ["一个{a}在一个{b}的{rel}", "{a}在{b}的{rel}"]
BEFORE_ZH = ["{behind}背景上有一个{a}和一个{b}", "{a}和{b},{behind}背景", "图中有{a}与{b},背景是{behind}"]


def long_english(scene: Scene, voice: Voice) -> str:
    """60 to 140 words: the background, every thing with all it has, then places and relations until long enough."""
    random = voice.random
    things = random.sample(scene.things, len(scene.things))
    sentences = [_whole(thing, voice) for thing in things]
    sentences.insert(random.randrange(len(sentences) + 1), _background(scene, voice))
    wanted = random.randint(*LONG_WORDS)
    makers: list[Callable[[], str]] = [
        lambda: _related(random.sample(scene.things, 2), voice),
        lambda: _detail(random.choice(scene.things), voice),
    ]
    length = sum(len(s.split()) for s in sentences)
    while length < wanted:
        sentences.append(random.choice(makers)())
        length += len(sentences[-1].split())
    return " ".join(sentences)


def _whole(thing: Thing, voice: Voice) -> str:
    frame = voice.frame(
        [
            "at the {place} there is a {size} {fill} {colour} {shape} .",
            "a {size} {colour} {shape} that is {fill} is at the {place} .",
            "the {place} holds a {fill} {size} {colour} {shape} .",
        ],
        [
            "towards the {place} you find one {size} {fill} {colour} {shape} .",
            "{place} : {fill} {size} {colour} {shape} .",
        ],
    )
    return _fill(frame, thing, voice)


def _detail(thing: Thing, voice: Voice) -> str:
    frame = voice.frame(
        [
            "the {colour} {shape} is {size} and {fill} .",
            "look at the {place} for the {colour} {shape} .",
            "the {shape} at the {place} has the colour {colour} .",
        ],
        ["this {colour} {shape} looks {fill} , rather {size} .", "its {shape} near {place} shines {colour} ."],
    )
    return _fill(frame, thing, voice)


def _fill(frame: str, thing: Thing, voice: Voice) -> str:
    said = {name: voice.say(getattr(thing, name)) for name in ("size", "fill", "colour", "shape")}
    return frame.format(place=voice.phrase(words.PLACES_EN[place(thing)]), **said)


def _related(things: list[Thing], voice: Voice) -> str:
    one, other = things
    first, second = (f"{voice.say(t.colour)} {voice.say(t.shape)}" for t in (one, other))
    between = voice.phrase(words.RELATIONS[relation(one, other)])
    frame = voice.frame(["the {a} is {rel} the {b} ."], ["find this {a} {rel} that {b} ."])
    return frame.format(a=first, b=second, rel=between)


def _background(scene: Scene, voice: Voice) -> str:
    frame = voice.frame(
        ["the background is {texture} {ground} .", "everything lies on {texture} {ground} ."],
        ["{texture} {ground} covers all behind ."],
    )
    return frame.format(texture=voice.say(scene.texture), ground=voice.say(scene.ground))
