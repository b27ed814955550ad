"""Chat-format teachers: a caption becomes a user's turn, as the released LLM2CLIP teachers read it.

`<header>caption<closing>`, where the vector is pooled over the caption and the closing token but not the header
(the released Llama-3-8B-Instruct: header `<|start_header_id|>user<|end_header_id|>` and two line breaks, closing
`<|eot_id|>`). The header is held as the SentenceTransformer's prompt; the closing token is put in by the tokenizer,
so that a caption that is cut still ends with it, and so that a saved teacher needs none of our code.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from llm2clip.errors import UsageError, one_line, setting

MARK = "CAPTION"
LLAMA_3 = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
"""A user's turn of Llama-3: header and closing token."""


def use_chat_template(tokenizer: Any) -> str:
    """Make `tokenizer` end every text with the closing token of a user's turn; returns the turn's header.

    Raises:
        UsageError: if the tokenizer has no chat template, or one without a closing token.
    """
    from tokenizers import processors

    header, closing = turn_of(tokenizer)
    # One template for all: of two in a row, tokenizers applies the second wrongly.
    begin = _tokens_before(tokenizer)
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in [*begin, closing]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", closing], pair=[*begin, "$A", "$B:1", closing], special_tokens=list(special.items())
    )
    if closing not in tokenizer.all_special_tokens:
        # sentence-transformers counts a prompt's tokens less a special one at its end.
        tokenizer.add_special_tokens({"extra_special_tokens": [closing]}, replace_extra_special_tokens=False)
    return header


def strip_ends(tokenizer: Any, header: str) -> None:
    """Make `tokenizer` drop the white space at a caption's end, as the released teachers read it.

    A header's own line breaks stay, also where it stands alone: its tokens are counted so. Where they would not, the
    tokenizer stays as it is. It is not for training, where an instruction that ends with a line break follows the
    header.
    """
    from tokenizers import Regex, normalizers

    backend = tokenizer.backend_tokenizer
    special = [text for text in tokenizer.get_added_vocab() if text]
    tail = header  # what is normalised together with a caption: what follows the header's last special token
    while (token := _first_special(tail, special)) is not None:
        tail = tail[tail.index(token) + len(token) :]
    stem = re.escape(tail.rstrip())
    before, texts = backend.normalizer, [header, f"{header}a red disc", f"{header}a red\n disc."]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    # \A and \z are the text's ends; what others write so are those of a line here
    strip = normalizers.Replace(Regex(rf"(?<=\S)(?<!\A{stem})\s+\z" if stem else r"(?<=\S)\s+\z"), "")
    backend.normalizer = strip if before is None else normalizers.Sequence([strip, before])
    if [tokenizer(text)["input_ids"] for text in texts] != expected:
        backend.normalizer = before


def turn_of(tokenizer: Any) -> tuple[str, str]:
    r"""The header and the closing token of a user's turn, without any system message the template adds.

    Example: `("<|im_start|>user\n", "<|im_end|>")` for Qwen.
    """
    if not getattr(tokenizer, "chat_template", None):
        if speaks_llama_3(tokenizer):
            return LLAMA_3
        raise UsageError(f"{setting('chat_template')}: this model's tokenizer has no chat template; leave it out")
    first = _render(tokenizer, [("user", MARK)])
    later = _render(tokenizer, [("user", "x"), ("assistant", "y"), ("user", MARK)])
    special = [text for text in tokenizer.get_added_vocab() if text]
    closing = _first_special(first.split(MARK, 1)[1], special)
    if closing is None:
        raise UsageError(f"{setting('chat_template')}: this tokenizer's template closes a turn with no special token")
    # What stands before the caption both in a first and in a later turn is the turn's own header: a system message
    # stands only before the first, the end of the assistant's turn only before the later one.
    common = _common_end(first.split(MARK, 1)[0], later.rsplit(MARK, 1)[0])
    if common.lstrip().startswith(closing):
        common = common.lstrip()[len(closing) :].lstrip()
    start = _first_special(common, special)
    header = common[common.index(start) :] if start else common.lstrip()
    return header.rstrip(" "), closing


def speaks_llama_3(tokenizer: Any) -> bool:
    """Whether the tokenizer has the tokens of Llama-3's turns, chat template or not."""
    known = tokenizer.get_added_vocab()
    return all(token in known for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))


def _tokens_before(tokenizer: Any) -> list[str]:
    """What the tokenizer itself puts before a text: the begin-of-text token, or nothing."""
    bare = tokenizer(MARK, add_special_tokens=False)["input_ids"]
    ids = tokenizer(MARK)["input_ids"]
    place = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids[:place])]


def _render(tokenizer: Any, turns: list[tuple[str, str]]) -> str:
    """The conversation as text; a template that does not read texts, as those of models with images, gets parts.

    Raises:
        UsageError: if the template can write down neither.
    """
    detail = f"it leaves out or rewrites a text such as {MARK!r}"
    for parts in (False, True):
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if parts else content}
            for role, content in turns
        ]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            detail = one_line(error)
        else:
            if MARK in text:
                return text
    raise UsageError(f"{setting('chat_template')}: this tokenizer's template does not take a user's turn ({detail})")


def _common_end(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return a[len(a) - length :]


def _first_special(text: str, special: list[str]) -> str | None:
    places = [(text.index(token), -len(token), token) for token in special if token in text]
    return min(places)[2] if places else None
