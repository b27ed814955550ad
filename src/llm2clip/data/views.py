"""Caption views: what a caption says without its first sentence, or in some of its sentences, as kinds of their own.

Long captions often begin with a summary, and a model that reads no further can tell their images apart by it.
DeBias-CLIP (arXiv 2602.22419) takes the summary away and samples sentences of what is left. In a bank a caption has one
view of each name, always the same.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

END = re.compile(r"""(?<![.!?])[.!?]+["'”’»)\]]*\s+|[。！？]+["'”’」』）]*\s*""")
"""Where a sentence may end: at marks before a space or at full-width ones, with quotes and brackets that close."""
ABBREVIATION = re.compile(
    r"(?<!\w)([A-Z]|([^\W\d_]\.)+[^\W\d_]|(?i:mr|mrs|ms|dr|st|mt|vs|approx|sr|sra|srta|dra|p|ej))$"
)
"""What a single full stop ends no sentence behind: an initial, "e.g", "U.S", and usual English and Spanish ones."""
LONGEST_ABBREVIATION = 16


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the space behind it: together they are the text.

    What has no letter is no sentence, but part of the one beside it.

    >>> split_sentences("A dog, e.g. 3.5 m long. ¿Es grande? 一只狗。很大！")
    ['A dog, e.g. 3.5 m long. ', '¿Es grande? ', '一只狗。', '很大！']
    """
    found: list[str] = []
    start = looked_at = 0
    has_letter = False
    for mark in END.finditer(text):
        has_letter = has_letter or _has_letter(text[looked_at : mark.start()])
        looked_at = mark.end()
        if has_letter and not (mark.group().rstrip() == "." and _is_abbreviated(text, start, mark.start())):
            found.append(text[start:looked_at])
            start, has_letter = looked_at, False
    tail = text[start:]
    if _has_letter(tail) or not found:
        return [*found, tail]
    return [*found[:-1], found[-1] + tail]


def _has_letter(text: str) -> bool:
    return any(map(str.isalpha, text))


def _is_abbreviated(text: str, start: int, end: int) -> bool:
    return ABBREVIATION.search(text, max(start, end - LONGEST_ABBREVIATION), end) is not None


def rest(sentences: Sequence[str]) -> str:
    """All sentences but the first; empty if there is no other.

    >>> rest(["A dog. ", "It is old. ", "It barks."])
    'It is old. It barks.'
    """
    return "".join(sentences[1:]).strip()


def sample(sentences: Sequence[str]) -> str:
    """Some of the sentences behind the first, in their order; empty if there are fewer than two of them.

    How many, from one to all but one, and which, is drawn evenly, from nothing but the text.

    >>> sample(["A dog. ", "It is old."]), sample(["A dog. ", "It is old. ", "It barks."])
    ('', 'It barks.')
    """
    others = sentences[1:]
    if len(others) < 2:
        return ""
    generator = random.Random("".join(sentences))
    count = 1 + int(generator.random() * (len(others) - 1))  # random() alone gives the same in every Python
    ranks = [generator.random() for _ in others]
    drawn = sorted(sorted(range(len(others)), key=ranks.__getitem__)[:count])
    return "".join(others[place] for place in drawn).strip()


VIEWS: dict[str, Callable[[Sequence[str]], str]] = {"rest": rest, "sample": sample}
"""Name of a view -> what it makes of a caption's sentences; "" for nothing."""


def views_of(views: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Kind, view and the kind that it makes, for each view asked for.

    >>> views_of({"long": "rest,sample"})
    [('long', 'rest', 'long-rest'), ('long', 'sample', 'long-sample')]
    """
    parts = [(kind, name.strip()) for kind, names in views.items() for name in names.split(",")]
    return [(kind, name, f"{kind}-{name}") for kind, name in parts]


def add_views(captions: Mapping[str, tuple[str, ...]], views: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """`captions` by kind, and their views as further kinds, each text once; a kind without any is left out.

    >>> add_views({"long": ("A dog. It is old.", "One dog.")}, {"long": "rest,sample"})
    {'long': ('A dog. It is old.', 'One dog.'), 'long-rest': ('It is old.',)}
    """
    found = dict(captions)
    for kind, name, made in views_of(views):
        texts = (VIEWS[name](split_sentences(text)) for text in captions.get(kind, ()))
        if kept := tuple(dict.fromkeys(filter(None, texts))):
            found[made] = kept
    return found
