"""join-teachers: one teacher of several, an LLM and a CLIP's own text half for example."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch.nn.functional import normalize

from llm2clip.artifacts import is_complete, open_output, say_complete, write_manifest
from llm2clip.errors import LLM2CLIPError, UsageError, setting
from llm2clip.hub import ModelFolder, drop_remote_code, find_model
from llm2clip.teacher.config import JoinConfig
from llm2clip.teacher.fingerprint import compute_fingerprint, quick_digests, remember_origin, teacher_fingerprint
from llm2clip.teacher.joined_module import Joined
from llm2clip.teacher.model import check_weights, load_joined, load_teacher, one_line_errors

logger = logging.getLogger("llm2clip")
TWO_TOWERS = ("clip", "metaclip_2", "siglip", "siglip2")
"""Model types of transformers whose text half can be a member."""
TEXT_HALF: Any = {"text": {"method": "get_text_features", "method_output_name": "pooler_output"}}
PROBES = ("a red disc", "Two Children in yellow RAINCOATS stand behind a dog. " * 12 + "It ends here.")
MIN_COSINE = 0.9999


def join_teachers(config: JoinConfig) -> Path:
    """Write the teacher that `config` describes and return its folder; it is loaded again and compared first.

    Raises:
        UsageError: if one of the teachers is no text encoder, or cannot lie in one folder with others.
        LLM2CLIPError: if what was written gives other vectors than the teachers.

    Example:
        >>> settings = JoinConfig(teachers=("teacher", "openai/clip-vit-large-patch14-336"), out="joined")
        >>> join_teachers(settings)                                                    # doctest: +SKIP
    """
    out = Path(config.out)
    opened = open_members(config.teachers, config.revisions, trust_remote_code=config.trust_remote_code)
    encoders = [] if is_complete(out) else list(opened)
    with open_output(out, "teacher", config=config.settings()):
        if is_complete(out):
            say_complete(out)
            return out
        write_manifest(out, "teacher", config=config.settings(), **write_joined(config, encoders))
    return out


def write_joined(config: JoinConfig, encoders: list[SentenceTransformer]) -> dict[str, Any]:
    """Write the joined teacher's files; returns what its manifest says of them.

    Args:
        encoders: from `open_members`; emptied, as what was written is loaded again and needs the room.

    Raises:
        LLM2CLIPError: if what was written gives other vectors than the teachers.
    """
    out = Path(config.out)
    weights = config.weights or (1.0,) * len(encoders)
    expected = joined_vectors(encoders, weights)
    joined = join(encoders, weights)
    joined.save_pretrained(str(out), create_model_card=False)
    facts = [
        {"name": name, "fingerprint": teacher_fingerprint(encoder), "dim": member["dim"]}
        for name, encoder, member in zip(config.teachers, encoders, joined[0].members, strict=True)  # type: ignore[union-attr,arg-type]
    ]
    encoders.clear()
    del joined
    gc.collect()
    found = load_joined(out, device="cpu", trust_remote_code=config.trust_remote_code).encode(list(PROBES))
    least = float(torch.cosine_similarity(torch.as_tensor(found), expected).min())
    if not least >= MIN_COSINE:
        raise LLM2CLIPError(f"{out} gives other vectors than its members: least cosine {least:.6f}")
    files = {"fingerprint": compute_fingerprint(out), "files": quick_digests(out)}
    return {**files, "dim": expected.shape[1], "members": facts}


def join(encoders: Sequence[SentenceTransformer], weights: Sequence[float]) -> SentenceTransformer:
    """One encoder made of the modules of several."""
    members = [
        {
            "dim": len(encoder.encode("a")),
            "weight": weight,
            "prompt": encoder.prompts.get(encoder.default_prompt_name or "") or "",
            # Said again here: a Gemma tokenizer, that of SigLIP 2, forgets it when it is read back.
            "lower_case": bool(getattr(encoder[0], "do_lower_case", False)),
        }
        for encoder, weight in zip(encoders, weights, strict=True)
    ]
    module = Joined({str(i): list(encoder.children()) for i, encoder in enumerate(encoders)}, members)
    return SentenceTransformer(modules=[module], device="cpu").eval()


def joined_vectors(encoders: Sequence[SentenceTransformer], weights: Sequence[float]) -> torch.Tensor:
    """What the joined teacher must make of the probes, from each member by itself."""
    parts = [torch.as_tensor(encoder.encode(list(PROBES))).float() for encoder in encoders]
    return torch.cat([weight * normalize(part, dim=-1) for part, weight in zip(parts, weights, strict=True)], dim=-1)


def open_members(
    names: Sequence[str], revisions: Sequence[str], *, trust_remote_code: bool, what: str = "teachers"
) -> Iterator[SentenceTransformer]:
    """The teachers to be joined, one after another, on the CPU.

    Args:
        revisions: one each, or none.
        what: the setting that names them, for messages.

    Raises:
        UsageError: if one is no text encoder, or has code of its own.
    """
    for name, revision in zip_longest(names, revisions):
        logger.info("reading %s", name)
        folder = find_model(name, revision=revision)
        if folder.kind == "transformers" and folder.config.get("model_type") in TWO_TOWERS:
            encoder = text_half(folder)
        else:
            encoder = load_teacher(folder, device="cpu", dtype="auto", trust_remote_code=trust_remote_code)
        for module in encoder.children():
            if isinstance(module, Joined) or not type(module).__module__.startswith("sentence_transformers."):
                raise UsageError(
                    f"{setting(what)} {name} has a module that is not sentence-transformers' own "
                    f"({type(module).__name__}); join others, or the members of a joined teacher themselves"
                )
        if getattr(getattr(encoder[0], "model", None), "peft_config", None):
            raise UsageError(
                f"{setting(what)} {name} is an adapter on another model's weights; merge it into them first"
            )
        yield encoder


def text_half(folder: ModelFolder) -> SentenceTransformer:
    """The text encoder of a CLIP or SigLIP, projection included, reading captions as it was trained.

    Captions are cut to its context, the closing token kept. SigLIP models read lower-case text padded to that length,
    without an attention mask; see `llm2clip.eval.encoders`, which reads them alike.
    """
    siglip = folder.config["model_type"].startswith("siglip")
    with one_line_errors(folder.name):
        transformer = Transformer(
            str(folder.path),
            model_kwargs={"dtype": "auto", "use_safetensors": True},
            modality_config=TEXT_HALF,
            module_output_name="sentence_embedding",
            do_lower_case=siglip,
        )
        check_weights(transformer, folder)
        drop_remote_code(transformer)
        model, tokenizer = transformer.model, transformer.tokenizer
        context = min(int(model.config.text_config.max_position_embeddings), tokenizer.model_max_length)
        transformer.max_seq_length = context
        if siglip:
            padded = {"padding": "max_length", "max_length": context, "return_attention_mask": False}
            transformer.processing_kwargs = {"text": padded}
        # No images will come; a tower without layers keeps the format loadable.
        model.vision_model.encoder.layers = torch.nn.ModuleList()
        model.config.vision_config.num_hidden_layers = 0
    encoder = SentenceTransformer(modules=[transformer], device="cpu")
    remember_origin(encoder, folder)
    return encoder.eval()
