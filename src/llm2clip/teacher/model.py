"""The only place that finds, makes, loads and saves a teacher; a teacher is a SentenceTransformer."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from llm2clip import hub
from llm2clip.errors import UsageError, setting
from llm2clip.hub import ModelFolder, cast, compare_weights, drop_remote_code, find_model, listed, quiet_transformers
from llm2clip.released import known_teacher
from llm2clip.teacher.adapter import adapter_digest, base_and_adapter, merged
from llm2clip.teacher.chat import speaks_llama_3, strip_ends, use_chat_template
from llm2clip.teacher.fingerprint import remember_origin, teacher_fingerprint
from llm2clip.teacher.joined_module import Joined
from llm2clip.teacher.reach import FAILURES, FIRST_ID, PROBE_TOKENS, check_length, check_tokens, first_line

__all__ = ["llm_as_encoder", "load_teacher", "save", "teacher_fingerprint"]

logger = logging.getLogger("llm2clip")
POOLING_MODES = {"mean": "mean", "last-token": "lasttoken", "weighted": "weightedmean"}
TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
VISION_HINTS = ("vision", "vit", "dino", "siglip", "clip", "eva", "swin", "convnext", "resnet", "timm")
LLM2VEC_CLASS = re.compile(r"(Llama|Mistral|Gemma|Qwen2)(Bi\w*|Encoder)Model")
"""LLM2Vec's two-way classes: the plain model of transformers, same weights, without the causal mask."""


def load_teacher(
    path_or_id: str | Path | ModelFolder,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """A teacher ready to encode, in evaluation mode: one of ours, any SentenceTransformer, or a bare LLM.

    One of ours comes back with the attention it was trained with. A bare decoder LLM is wrapped as
    `llm_as_encoder` does by default, a released LLM2CLIP teacher with captions as a user's turn; other embedders keep
    their own pooling and prompts.

    Args:
        dtype: of the weights; "auto" for as saved. By default as saved too, but float32 where this CPU would emulate a
            half precision.

    Raises:
        UsageError: if `path_or_id` is no text model.

    Example:
        >>> teacher = load_teacher("teacher")                                           # doctest: +SKIP
        >>> teacher.encode(["a red disc", "a blue square"]).shape                       # doctest: +SKIP
        (2, 4096)
    """
    folder = find_text_model(path_or_id, revision=revision)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if folder.kind == "adapter" or (folder.kind == "transformers" and is_decoder(folder.config)):
        teacher = llm_as_encoder(folder, chat_template=None, **options)
    elif (folder.path / Joined.config_file_name).exists():
        with one_line_errors(folder.name):
            teacher = load_joined(folder.path, **options)
        check_weights(teacher, folder)
        drop_remote_code(teacher)
        remember_origin(teacher, folder)
    else:
        teacher = _load_embedder(folder, **options)
    return cast(teacher, teacher.device) if dtype is None else teacher


def _load_embedder(
    folder: ModelFolder,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    trust_remote_code: bool,
) -> SentenceTransformer:
    """A SentenceTransformer's folder, or that of an encoder, pooled as sentence-transformers does."""
    with one_line_errors(folder.name):
        teacher = SentenceTransformer(
            str(folder.path),
            device=str(device) if device is not None else None,
            trust_remote_code=trust_remote_code,
            model_kwargs={"use_safetensors": True, **({"dtype": dtype} if dtype is not None else {})},
        )
    check_weights(teacher, folder)
    drop_remote_code(teacher)
    for module in teacher.modules():
        if isinstance(module, Transformer) and module.tokenizer is not None and "text" in module.modalities:
            check_tokens(module.model, module.tokenizer, folder.name)
            check_length(module, folder.name)
    if folder.made == "teacher":
        restore_attention(teacher, folder.manifest["config"]["attention"])
        teacher.prompts.update(prompts_of(teacher.prompts.get("caption") or "") or {})  # those of before lack two
    _route_captions(teacher, folder.name)
    remember_origin(teacher, folder)
    return teacher.eval()


def load_joined(
    folder: Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """A joined teacher (see `llm2clip.teacher.join`), put together without running the code file in its folder."""
    module = Joined.load(
        str(folder),
        trust_remote_code=trust_remote_code,
        model_kwargs={"dtype": dtype} if dtype is not None else None,
    )
    return SentenceTransformer(modules=[module], device=str(device) if device is not None else None).eval()


def llm_as_encoder(
    path_or_id: str | Path | ModelFolder,
    *,
    pooling: str = "mean",
    attention: str = "two-way",
    max_length: int = 512,
    chat_template: bool | None = False,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: bool = False,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """A decoder LLM as a text encoder: `encode(texts)` gives vectors `[N, hidden]`.

    A peft adapter's folder is the LLM it sits on, with the adapter merged into its weights.

    Args:
        pooling: "mean", "last-token" or "weighted" (later tokens weigh more).
        attention: "two-way" or "causal".
        max_length: tokens read of each text.
        chat_template: wrap each text as a user's turn, header not pooled (see `llm2clip.teacher.chat`); None for as
            the LLM was tuned: only Llama-3 models from LLM2Vec, such as the released LLM2CLIP teachers, are wrapped.
        quantize: hold the weights in 4 bits, through bitsandbytes.

    Raises:
        UsageError: if `path_or_id` is no decoder LLM with a tokenizer.
    """
    folder, adapter = base_and_adapter(find_text_model(path_or_id, revision=revision))
    from_llm2vec = is_from_llm2vec(folder.config) or (adapter is not None and is_from_llm2vec(adapter.config))
    trust_remote_code = trust_remote_code and not from_llm2vec
    model_kwargs: dict[str, Any] = {"dtype": dtype or "auto"}
    if quantize:
        model_kwargs["quantization_config"] = four_bit_config()
    transformer = _open_llm(folder, model_kwargs, max_length=max_length, trust_remote_code=trust_remote_code)
    if adapter is not None:
        transformer.model = merged(transformer.model, adapter)
    prepare_tokenizer(transformer.tokenizer, folder.name)
    wrapped = from_llm2vec and speaks_llama_3(transformer.tokenizer)
    if as_tuned := chat_template is None:
        chat_template = wrapped
    elif wrapped and not chat_template:
        logger.warning(
            "%s was tuned on captions as a user's turn; add %s to keep to that",
            folder.name,
            setting("chat_template", True),
        )
    header = use_chat_template(transformer.tokenizer) if chat_template else ""
    if header and as_tuned:
        strip_ends(transformer.tokenizer, header)
    check_tokens(transformer.model, transformer.tokenizer, folder.name, header=header)
    encoder = SentenceTransformer(
        modules=[
            transformer,
            Pooling(transformer.get_embedding_dimension(), pooling_mode=POOLING_MODES[pooling], include_prompt=False),
        ],
        prompts=prompts_of(header),
        default_prompt_name="caption" if header else None,
        device=str(device) if device is not None else None,
    )
    restore_attention(encoder, attention)
    check_attention(encoder, attention, folder.name)
    check_length(transformer, folder.name)
    settings = {"pooling": pooling, "attention": attention, "max_length": max_length, "chat_template": chat_template}
    if adapter is not None:
        settings["adapter"] = adapter_digest(adapter)
    remember_origin(encoder, folder, settings=settings)
    return encoder.eval()


def _open_llm(
    folder: ModelFolder, model_kwargs: dict[str, Any], *, max_length: int, trust_remote_code: bool
) -> Transformer:
    """An LLM and its tokenizer as sentence-transformers' module, every weight accounted for."""
    trust = {"trust_remote_code": trust_remote_code}
    with one_line_errors(folder.name):
        transformer = Transformer(
            str(folder.path),
            model_kwargs={**model_kwargs, **trust, "use_safetensors": True},
            config_kwargs=trust,
            processor_kwargs=dict(trust),
            max_seq_length=max_length,
            # Named, because an Instruct LLM's tokenizer would otherwise wrap every caption in its chat template.
            modality_config=TEXT_ONLY,
            module_output_name="token_embeddings",
        )
    check_weights(transformer, folder)
    drop_remote_code(transformer)
    return transformer


def prompts_of(header: str) -> dict[str, str] | None:
    """The prompts of a teacher that reads every text behind `header`, by whichever call it comes.

    `encode_query` and `encode_document` take their own prompts and not the default one; without these sentence-
    transformers makes them empty.
    """
    return dict.fromkeys(("caption", "query", "document"), header) if header else None


def _route_captions(teacher: SentenceTransformer, name: str | Path) -> None:
    """Let captions go the way of documents in a Router that would ask each time."""
    routers: list[Any] = [module for module in teacher if isinstance(module, Router)]
    for router in routers:
        if router.default_route is None and not router.route_mappings:
            if "document" not in router.sub_modules:
                routes = ", ".join(router.sub_modules)
                raise UsageError(f"{name} is a Router with the routes {routes} and no default; set its default_route")
            router.default_route = "document"


def llm(encoder: SentenceTransformer) -> Any:
    """The transformers (or peft) model inside an encoder."""
    first: Any = encoder[0]
    return first.model


def restore_attention(encoder: SentenceTransformer, attention: str) -> None:
    """Set two-way or causal attention on a loaded model: the flag given at loading time would be dropped."""
    config = llm(encoder).config
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.is_causal = attention == "causal"


def check_attention(encoder: SentenceTransformer, attention: str, name: str | Path) -> None:
    """Raise if the LLM does not attend as it was told to: some models of foreign code do not listen.

    Raises:
        UsageError: saying which attention the model has.
    """
    ids = torch.arange(2 * PROBE_TOKENS, device=encoder.device).view(2, -1) + FIRST_ID
    ids[1, :-1] = ids[0, :-1]  # the two differ in the last token only
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "modality": "text"}
    try:
        with torch.no_grad():
            states = encoder[0](features)["token_embeddings"]
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:  # such as a model that builds its own mask, and finds none where all may see all
        other = "causal" if attention == "two-way" else "two-way"
        raise UsageError(
            f"{name} fails with {attention} attention ({first_line(error)}); give {setting('attention', other)}, or "
            "another LLM"
        ) from error
    moved = not torch.allclose(states[0, 0], states[1, 0], rtol=1e-4, atol=1e-6)
    if moved != (attention == "two-way"):
        has = "two-way" if moved else "causal"
        raise UsageError(f"{name} keeps its {has} attention whatever its config says; give {setting('attention', has)}")


def prepare_tokenizer(tokenizer: Any, name: str | Path) -> None:
    """Give the tokenizer a padding token, and padding on the right: position 0 is then a caption's first token."""
    if tokenizer is None:
        raise UsageError(f"{name} has no tokenizer; put its tokenizer files beside config.json")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"{name}: its tokenizer has neither a padding nor an end-of-text token; set one")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"


def save(encoder: SentenceTransformer, folder: Path, *, attention: str) -> None:
    """Write a teacher's files to `folder`: a SentenceTransformer folder that any program loads with its attention.

    The attention is written as `is_causal` into `config.json`, where transformers reads it back.
    """
    restore_attention(encoder, attention)
    for module in list(encoder)[1:]:  # not the LLM, whose position frequencies stay in fp32
        module.to(llm(encoder).dtype)  # an adaptor trains in fp32 whatever the LLM is held in
    encoder.save_pretrained(str(folder), create_model_card=False)


def four_bit_config() -> Any:
    """How bitsandbytes holds 4-bit weights."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UsageError(f"{setting('quantize')} needs bitsandbytes: pip install 'llm2clip[quantize]'") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def find_text_model(name: str | Path | ModelFolder, *, revision: str | None = None) -> ModelFolder:
    """The folder of a text model, downloaded for a Hub id.

    Raises:
        UsageError: saying what it holds instead.
        ArtifactError: if it is a teacher that is not finished.
    """
    folder = find_model(name, revision=revision)
    if folder.kind == "released":
        raise UsageError(
            f"{folder.name} is a student, which sees images; give its teacher, {known_teacher(folder.name) or 'an LLM'}"
        )
    if folder.made not in ("teacher", ""):
        raise UsageError(
            f"{folder.name} is no teacher (found: {folder.made}); give the folder that train-teacher made, or an LLM"
        )
    if folder.kind == "transformers":
        kind = str(folder.config.get("model_type", ""))
        architectures = " ".join(folder.config.get("architectures") or [])
        if any(hint in (kind + architectures).lower() for hint in VISION_HINTS) and "vocab_size" not in folder.config:
            raise UsageError(
                f"{folder.name} is a vision model ({kind or architectures}), not a language model; give an LLM"
            )
        if not kind:
            raise UsageError(f"{folder.name} is no transformers model: its config.json has no model_type")
    return folder


def is_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a decoder LLM, which attends causally unless told otherwise."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    architectures = " ".join(config.get("architectures") or [])
    if "CausalLM" in architectures or "LMHead" in architectures:
        return True
    kind = config.get("model_type", "")
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_from_llm2vec(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` names a two-way class of LLM2Vec, as those of the released LLM2CLIP teachers do.

    Their code was written for transformers 4.40 to 4.46 and is not needed: with `is_causal` off, the plain model is
    the same.
    """
    named = [*(config.get("architectures") or []), *map(str, (config.get("auto_map") or {}).values())]
    named.append(str((config.get("auto_mapping") or {}).get("base_model_class")))  # an adapter's
    return any(LLM2VEC_CLASS.fullmatch(name.rsplit(".", 1)[-1]) for name in named)


@contextlib.contextmanager
def one_line_errors(name: str | Path) -> Iterator[None]:
    """Turn what loading a model from `name` may raise into one line; loading itself is kept quiet.

    Transformers would report the LLM's output layer as an unexpected weight, each time.

    Raises:
        UsageError: if the model cannot be loaded.
    """
    with hub.one_line_errors(f"{name} cannot be loaded as a text model"), quiet_transformers():
        yield


def check_weights(model: torch.nn.Module, folder: ModelFolder) -> None:
    """Raise if the files of a model lack some of its weights, which transformers then draws at random.

    Those beyond are named in the log, where another program wrote them.

    Raises:
        UsageError: naming one that is missing, or what is too much in a folder of ours.
    """
    with one_line_errors(folder.name):
        missing, left = compare_weights(model, folder.path)
    if left and folder.made:
        raise UsageError(
            f"{folder.name} holds weights that its model does not have ({listed(left)}); get its files again"
        )
    if left:
        logger.info("%s: of its weights are left out: %s", folder.name, listed(left))
    if missing:
        raise UsageError(
            f"{folder.name} lacks weights of its model, such as {missing[0]} ({len(missing)} in all); get its files "
            "again"
        )
