"""Put a vision tower and an LLM together as a LLaVA-1.5 of transformers: `python -m examples.llava.make_llava --help`.

The projector between them is random; `examples.llava.train` trains it.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from llm2clip.artifacts import check_name, is_complete, open_output, write_manifest
from llm2clip.config import to_dict
from llm2clip.errors import LLM2CLIPError, UsageError, setting, settings_as_flags
from llm2clip.hub import one_line_errors, quiet_transformers
from llm2clip.student.start import load_tower, open_tower, open_transform
from llm2clip.student.tower import default_pooling, resize_tower

IMAGE, WORD = "<image>", "< image >"
"""What stands for an image, and what a user who wrote the former in a text is taken to have written."""
FLATTENED = """
{%- set llava = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set said = namespace(images='', text='') -%}
{%- if message['content'] is string -%}
{%- set said.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set said.images = said.images + '<image>\\n' -%}
{%- else -%}
{%- set said.text = said.text + part['text'] | replace('<image>', '< image >') -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set llava.messages = llava.messages + [{'role': message['role'], 'content': said.images + said.text}] -%}
{%- endfor -%}
{%- set messages = llava.messages -%}
"""
"""Goes before an LLM's chat template, which knows nothing of images: a turn's images come first, then its text.

Of a turn in parts only an image part is an image; `<image>` in a text part is a word. In a turn that is one string,
as some test kits write it, `<image>` stands for an image.
"""
ONE_BOS = "{%- set bos_token = '' -%}"
"""Goes before the template of a tokenizer that begins every text with its own, so that no program begins it twice."""
VICUNA = (
    '{{ "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
    "detailed, and polite answers to the user's questions. \" }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""How LLaVA-1.5 writes a conversation."""


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """Build a LLaVA-1.5 from a vision tower and an LLM, with its processor and chat template, as one folder."""

    tower: str
    """The vision tower: a folder that `llm2clip export --to tower` wrote, or any CLIP, SigLIP, DINO or timm ViT."""
    llm: str
    """The LLM: any decoder that AutoModelForCausalLM opens, folder or Hub id."""
    out: Path
    """Folder to write; made if it is not there."""
    template: str | None = None
    """vicuna for LLaVA-1.5's own, or a file with a chat template (Jinja); by default the LLM's."""
    layer: int = -2
    """Which of the tower's hidden states the projector reads, counted from the last."""
    image_size: int | None = None
    """Side of the images in pixels; by default the tower's own, others interpolate its positions."""
    dtype: str = "auto"
    """What the weights are saved in: float32, bfloat16, float16; auto is the LLM's own."""
    seed: int = 0
    """Of the projector's random weights."""


def make_llava(config: MakeConfig) -> Path:
    """Write the folder that `config` describes and return it.

    Raises:
        UsageError: for a tower or an LLM that cannot be a LLaVA's.
    """
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    out = Path(config.out)
    if config.layer >= 0:
        raise UsageError(f"{setting('layer')} {config.layer}: it counts from the last; give -2 for LLaVA-1.5's")
    settings = {key: str(value) for key, value in to_dict(config).items() if key != "out"}
    with open_output(out, "llava", config=settings):
        if is_complete(out):
            return out
        tower, transform = open_vision(config.tower, config.image_size)
        num_tokens, patch_size = count_tokens(tower, transform.image_size[0], config.layer)
        num_patches = (transform.image_size[0] // patch_size) ** 2
        llm, tokenizer = open_llm(config.llm, config.template, config.dtype)
        prefix = num_tokens - num_patches  # class and register tokens; the first is left out
        if prefix < 0:
            raise UsageError(f"{setting('tower')}: {num_tokens} tokens of {num_patches} patches; take a plain ViT")
        select = "default" if prefix else "full"
        facts = LlavaConfig(
            vision_config=tower.config,
            text_config=llm.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=num_tokens - (prefix > 0),
            vision_feature_layer=config.layer,
            vision_feature_select_strategy=select,
            tie_word_embeddings=llm.config.tie_word_embeddings,
        )
        with torch.device("meta"):  # the parts' own weights take the place of random ones
            model: Any = LlavaForConditionalGeneration(facts)
        model.model.vision_tower, model.model.language_model = tower.to(llm.dtype), llm.base_model
        model.lm_head = llm.get_output_embeddings()
        torch.manual_seed(config.seed)
        model.model.multi_modal_projector.to_empty(device="cpu").to(llm.dtype)
        for name in ("linear_1", "linear_2"):
            getattr(model.model.multi_modal_projector, name).reset_parameters()
        model.generation_config = llm.generation_config or GenerationConfig()
        check_logits(model.eval(), llm.eval(), config.llm)
        if tower.config.model_type == "timm_tokens":
            save_code(model.config, out)
        model.save_pretrained(out)
        new_processor(tokenizer, transform, patch_size, prefix, select).save_pretrained(out)
        write_manifest(out, "llava", config=settings, image_tokens=facts.image_seq_length)
    return out


def open_vision(name: str, image_size: int | None) -> tuple[Any, Any]:
    """A tower, float32, and how it wants its images.

    Raises:
        UsageError: if `name` is no vision tower, or cannot have images of that size.
    """
    found = open_tower(name)
    size = image_size or found.image_size
    with one_line_errors(f"{found} cannot be used"):
        tower = found.whole[0].tower if found.whole else load_tower(found, pooling=default_pooling(found.config))
        if size != found.image_size:
            tower = resize_tower(tower, image_size=size)
        if tower.config.model_type == "timm_wrapper":
            from llm2clip.export.timm_tokens import with_tokens

            tower = with_tokens(tower, image_size=size)
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kind = tower.config.model_type
    if kind not in MODEL_MAPPING_NAMES and kind != "timm_tokens":
        raise UsageError(f"{setting('tower')}: AutoModel lists no {kind}, so that nothing would open the LLaVA")
    whole = AutoModel.from_config(tower.config)  # with a pooler that LLaVA leaves unused, if the family has one
    whole.load_state_dict(tower.state_dict(), strict=False)
    return whole.float().eval(), open_transform(found, image_size=size)


def count_tokens(tower: Any, image_size: int, layer: int) -> tuple[int, int]:
    """How many tokens an image becomes, class and register tokens included, and the side of a patch in pixels.

    Raises:
        UsageError: if the tower has no such layer, or gives maps and no tokens.
    """
    with torch.no_grad():
        states = tower(torch.zeros(1, 3, image_size, image_size), output_hidden_states=True).hidden_states
    patch = getattr(tower.config, "patch_size", None)
    if states is None or states[0].ndim != 3 or not isinstance(patch, int):
        raise UsageError(f"{setting('tower')}: a {tower.config.model_type} gives maps, no tokens; take a ViT")
    if -layer > len(states):
        raise UsageError(f"{setting('layer')} {layer}: the tower has {len(states)} hidden states; give -2")
    return states[layer].shape[1], patch


def open_llm(name: str, template: str | None, dtype: str) -> tuple[Any, Any]:
    """The LLM and its tokenizer, which knows `<image>`, a padding token, and a chat template with images.

    Raises:
        UsageError: if `name` is no LLM, or has no chat template and none is given.
    """
    from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

    what = f"{setting('llm')} {name}"
    check_name(name, what=setting("llm"))
    with one_line_errors(f"{what} cannot be used"), quiet_transformers():
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        llm: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    own = {"vicuna": VICUNA}.get(template or "", tokenizer.chat_template)
    if template not in (None, "vicuna"):
        if not Path(template or "").is_file():
            raise UsageError(f"{setting('template')} {template} is no file; give vicuna, or a file with a template")
        own = Path(template or "").read_text(encoding="utf-8").removesuffix("\n")
    if not isinstance(own, str):
        raise UsageError(f"{what} has no chat template; add {setting('template', 'vicuna')} (LLaVA-1.5's), or a file")
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = FLATTENED.strip() + (ONE_BOS if adds_bos else "") + own
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer))
    return llm, tokenizer


def check_logits(model: Any, llm: Any, name: str) -> None:
    """Raise if LLaVA makes of the same text other logits than the LLM, whose class does more to them (a cap, a scale).

    Raises:
        UsageError: naming the LLM.
    """
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        apart = (model(input_ids=ids).logits - llm(input_ids=ids).logits).abs().max().item()
    if not apart < 1e-3:
        raise UsageError(
            f"{setting('llm')} {name}: a {type(llm).__name__} computes its logits in a way that a LLaVA does not; "
            "take a Llama, Qwen, Mistral or the like"
        )


def new_processor(tokenizer: Any, transform: Any, patch_size: int, prefix: int, select: str) -> Any:
    """LLaVA's processor: images padded to a square with their mean colour, and as many image tokens as there are."""
    from transformers import LlavaImageProcessor, LlavaProcessor

    height, width = transform.image_size
    images = LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": height},
        crop_size={"height": height, "width": width},
        resample=transform.resample,
        image_mean=list(transform.mean),
        image_std=list(transform.std),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=prefix,
    )


def save_code(config: Any, out: Path) -> None:
    """Put the class of a timm tower beside the weights, for who has no llm2clip and gives `trust_remote_code=True`."""
    from llm2clip.export import timm_tokens

    shutil.copyfile(timm_tokens.__file__, out / "timm_tokens.py")
    config.auto_map = {"AutoConfig": "timm_tokens.LlavaConfig"}


def run(config_class: Any, function: Callable[[Any], Any]) -> None:
    """Read the flags, call `function`, and end with one line if it fails."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with settings_as_flags():
        try:
            print(function(tyro.cli(config_class)))
        except LLM2CLIPError as error:  # of a loader's process it comes with all that process's traceback
            line = str(error).strip().splitlines()[-1]
            sys.exit(f"error: {re.sub(r'^llm2clip[.]errors[.][A-Za-z]+: ', '', line)}")


if __name__ == "__main__":
    run(MakeConfig, make_llava)
