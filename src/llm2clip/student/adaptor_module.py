"""The adaptor as the last but one module of a text leg in a SentenceTransformer.

This file and `adaptor.py` are copied beside an exported model, which then needs no llm2clip:
`SentenceTransformer(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Module

from llm2clip.student.adaptor import Adaptor


class AdaptorModule(Module):
    """Teacher vectors [B, T] as shared-space vectors [B, D], not normalised.

    Args:
        teacher_dim: T.
        projection_dim: D.
        num_blocks: residual blocks of the adaptor.
        normalize: whether vectors are brought to unit length first.
    """

    __module__ = "adaptor_module"  # a saved model refers to the file beside it, also when a loaded one is saved again
    config_keys = ["teacher_dim", "projection_dim", "num_blocks", "normalize"]  # noqa: RUF012  (the base class reads it)

    def __init__(self, teacher_dim: int, projection_dim: int, num_blocks: int = 4, normalize: bool = True) -> None:
        super().__init__()
        self.teacher_dim, self.projection_dim = teacher_dim, projection_dim
        self.num_blocks, self.normalize = num_blocks, normalize
        self.adaptor = Adaptor(teacher_dim, projection_dim, num_blocks=num_blocks, normalize=normalize)

    def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        """`features` with their pooled vector replaced."""
        features["sentence_embedding"] = self.adaptor(features["sentence_embedding"])
        return features

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.projection_dim

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write settings and weights to `output_path`, and the code to the model's folder above it."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=True)
        for file in (__file__, inspect.getfile(Adaptor)):
            text = Path(file).read_text(encoding="utf-8").replace("from llm2clip.student.adaptor", "from .adaptor")
            (model_folder(Path(output_path)) / Path(file).name).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> AdaptorModule:  # type: ignore[override]
        """Read what `save` wrote."""
        hub = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        module = cls(**cls.load_config(model_name_or_path, subfolder=subfolder, **hub))
        return cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=module, **hub)  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: rebuilt by a function, as the class goes by a name that only a saved model knows."""
        return _rebuild, (self.get_config_dict(), self.state_dict())


def _rebuild(config: dict[str, Any], state: dict[str, torch.Tensor]) -> AdaptorModule:
    module = AdaptorModule(**config)
    module.load_state_dict(state)
    return module.to(next(iter(state.values())))


def model_folder(path: Path) -> Path:
    """The model's folder above one of its modules': the nearest with the settings that a SentenceTransformer saves."""
    marked = (folder for folder in path.parents if (folder / "config_sentence_transformers.json").exists())
    return next(marked, path)
