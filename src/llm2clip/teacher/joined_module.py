"""Several text encoders as one module: a caption's vector is theirs, one behind the other.

This file is copied beside a model saved with it, which then needs no llm2clip:
`SentenceTransformer(folder, trust_remote_code=True)`.

Letters: B texts, M members, T_m the width of a member's vector.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Router
from torch import nn
from torch.nn.functional import normalize

MODEL_FILE = "config_sentence_transformers.json"
FILE = "joined_module.py"


class Joined(Router):
    """Texts as vectors [B, T_1 + ... + T_M], each member's part of the length of its weight.

    A Router in how its members lie in memory and on disk; but all of them read every text.

    Args:
        sub_modules: the modules of each member, by its number ("0", "1", ...).
        members: of each member `dim`, the numbers kept of its vector; `weight`, the length they are given; `prompt`,
            put before a text unless the caller names one; `lower_case`, whether it reads lower-cased text.
    """

    __module__ = "joined_module"  # a saved model refers to the file beside it, also when a loaded one is saved again
    config_file_name = "joined_config.json"
    config_keys = ["members"]  # noqa: RUF012  (the base class reads it)

    def __init__(self, sub_modules: Mapping[str, Sequence[Any]], members: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(dict(sub_modules))  # type: ignore[arg-type]
        self.members = [dict(member) for member in members]
        for first, *others in sub_modules.values():
            dtype = next((weight.dtype for weight in first.parameters()), None)
            for module in others:  # a Dense layer is loaded in fp32 whatever the transformer before it is held in
                module.to(dtype)

    @property
    def modalities(self) -> list[Any]:
        """Texts only, whatever a member reads beside them."""
        return ["text"]

    def preprocess(  # type: ignore[override]
        self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What each member makes of the texts, its number and a dot before the names; the first's mask also bare."""
        features: dict[str, Any] = {}
        for (number, modules), member in zip(self.sub_modules.items(), self.members, strict=True):
            texts = [text.lower() for text in inputs] if member["lower_case"] else list(inputs)
            own = modules[0].preprocess(texts, prompt=prompt or member["prompt"] or None)  # type: ignore[index]
            features.update({f"{number}.{name}": value for name, value in own.items()})
        if "0.attention_mask" in features:  # by which a bank counts the tokens of a caption
            features["attention_mask"] = features["0.attention_mask"]
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """`features` with the joined vectors, float32, as `sentence_embedding`."""
        parts = []
        for (number, modules), member in zip(self.sub_modules.items(), self.members, strict=True):
            start = f"{number}."
            own = {name.removeprefix(start): value for name, value in features.items() if name.startswith(start)}
            vectors = modules(own)["sentence_embedding"][:, : member["dim"]]
            parts.append(member["weight"] * normalize(vectors.float(), dim=-1))
        features["sentence_embedding"] = torch.cat(parts, dim=-1)
        return features

    def get_embedding_dimension(self) -> int:
        """T_1 + ... + T_M."""
        return sum(member["dim"] for member in self.members)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the members to `output_path`, and this file to the model's folder: the nearest with its settings."""
        super().save(output_path, *args, **kwargs)
        path = Path(output_path)
        shutil.copyfile(__file__, next((p for p in (path, *path.parents) if (p / MODEL_FILE).exists()), path) / FILE)

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: rebuilt by a function, as the class goes by a name that only a saved model knows."""
        return _rebuild, ({name: list(modules) for name, modules in self.sub_modules.items()}, self.members)  # type: ignore[call-overload]


def _rebuild(sub_modules: dict[str, list[nn.Module]], members: list[dict[str, Any]]) -> Joined:
    return Joined(sub_modules, members).eval()
