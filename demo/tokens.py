"""The mini models' tokenizer: one token a word, one a Chinese character, its list taken from the text itself."""

from __future__ import annotations

from itertools import islice
from typing import Any

from demo.text import documents

SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<mask>")
NUM_DOCUMENTS = 4000
"""Documents that the word list is read from: enough that every word of the grammar occurs."""


def make_tokenizer(*, closing: bool = False) -> Any:
    """A fast transformers tokenizer over the words of the mini LLM's text.

    Args:
        closing: end each text with `</s>`, where CLIP's text encoder reads off its vector.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(strip_accents=False, lowercase=True, handle_chinese_chars=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    found: set[str] = set()
    for text in islice(documents(seed=0), NUM_DOCUMENTS):
        found.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *sorted(found)])}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closing else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    )
