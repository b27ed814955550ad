"""Whether captions are in the language that their column says, as far as scripts and the commonest words tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from llm2clip.errors import SourceError

LOOKED_AT = 500
"""Captions of a language, evenly of all."""
RANGES = {
    "ar": "\u0600-\u06ff",
    "bn": "\u0980-\u09ff",
    "el": "\u0370-\u03ff",
    "fa": "\u0600-\u06ff",
    "he": "\u0590-\u05ff",
    "hi": "\u0900-\u097f",
    "ja": "\u3040-\u30ff\u4e00-\u9fff",
    "jp": "\u3040-\u30ff\u4e00-\u9fff",
    "ko": "\uac00-\ud7a3",
    "ru": "\u0400-\u04ff",
    "te": "\u0c00-\u0c7f",
    "th": "\u0e00-\u0e7f",
    "uk": "\u0400-\u04ff",
    "zh": "\u4e00-\u9fff",
}
"""Language -> the letters that it is written in; all others in Latin ones."""
LATIN = "A-Za-z\u00c0-\u024f\u1e00-\u1eff"
WORDS = {
    "en": "a the of with and on is",
    "es": "un una de con en y el la",
    "it": "un una di con su e il che",
    "de": "ein eine mit auf und einem einer",
    "fr": "un une de avec et sur dans",
    "pl": "na w z i jest si\u0119",
    "tr": "bir ve i\u00e7in \u00fczerinde olan bu",
}
"""Language -> words that a caption in it often has."""


def check_language(captions: Sequence[str], language: str, where: str) -> None:
    """Check that the many captions of a file or column are in a language.

    Raises:
        SourceError: if most letters are not its, or their commonest words are another language's.
    """
    captions = captions[:: max(1, len(captions) // LOOKED_AT)]
    text = "".join(captions)
    if 2 * len(re.findall(f"[{RANGES.get(language, LATIN)}]", text)) < len(re.findall(r"[^\W\d_]", text)):
        raise SourceError(
            f"{where}: {captions[0][:40]!r} is not written as {language!r} is; languages are taken for each other, or "
            "the file is damaged"
        )
    if language in WORDS:
        counts = Counter(word for caption in captions for word in re.findall(r"\w+", caption.lower()))
        seen = {name: sum(counts[word] for word in words.split()) for name, words in WORDS.items()}
        likely = max(seen, key=lambda name: seen[name])
        if seen[likely] > seen[language]:
            raise SourceError(f"{where}: what should be {language!r} looks like {likely!r}; languages are exchanged")
