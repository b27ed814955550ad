"""A vision tower as the first module of an image leg in a SentenceTransformer, where AutoModel lists no class for it.

Of MetaCLIP 2, AltCLIP, OWL-ViT and others transformers lists the whole model alone. This file is copied beside an
exported model, which then needs no llm2clip: `SentenceTransformer(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers
from sentence_transformers.base.modules import Transformer

FILE, MODEL_FILE = "tower_module.py", "config_sentence_transformers.json"


class TowerModule(Transformer):
    """sentence-transformers' own module, but for telling AutoModel of the tower's class when it is loaded."""

    __module__ = "tower_module"  # a saved model refers to the file beside it, also when a loaded one is saved again

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the tower to `output_path`, and this file to the model's folder: the nearest with its settings."""
        super().save(output_path, *args, **kwargs)
        path = Path(output_path)
        shutil.copyfile(__file__, next((p for p in path.parents if (p / MODEL_FILE).exists()), path) / FILE)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> TowerModule:  # type: ignore[override]
        """Read what `save` wrote."""
        hub = {key: kwargs[key] for key in ("token", "revision", "local_files_only") if key in kwargs}
        cache = kwargs.get("cache_folder")
        config = transformers.AutoConfig.from_pretrained(
            model_name_or_path, subfolder=subfolder, cache_dir=cache, **hub
        )
        transformers.AutoModel.register(type(config), getattr(transformers, config.architectures[0]), exist_ok=True)
        return super().load(model_name_or_path, subfolder=subfolder, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: rebuilt by a function, as the class goes by a name that only a saved model knows."""
        return _rebuild, (self.__dict__,)


def _rebuild(state: dict[str, Any]) -> TowerModule:
    module = TowerModule.__new__(TowerModule)
    module.__setstate__(state)
    return module
