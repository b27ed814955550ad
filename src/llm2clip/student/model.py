"""The student: tower, visual projection, adaptor and temperature, as a `transformers` model.

This file, `tower.py` and `adaptor.py` are copied beside the weights, so a saved student loads without llm2clip by
`AutoModel.from_pretrained(folder, trust_remote_code=True)`; they import nothing but torch, transformers and each other.

Letters: B images, W tower width, T teacher width, D shared width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .adaptor import Adaptor
from .tower import build_tower, hold_locked_norms, pooled_output, tower_blocks

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100)  # CLIP (arXiv 2103.00020, section 2.5), kept by the released code


class StudentModelConfig(PreTrainedConfig):
    """What a student is made of.

    Args:
        vision_config: the tower's own config (or its dict, with `model_type`).
        tower_dim: W.
        teacher_dim: T.
        projection_dim: D; 1280 in the paper.
        adaptor_blocks: 4 in the paper.
        pooling: how the tower's image vector is read off, see `tower.pooled_output`.
        image_size: side in pixels of the images it was trained with.
        image_mean, image_std: per channel, of images scaled to 0..1.
        loss: "softmax" or "sigmoid"; the latter has a bias beside the scale.
        projection: "linear", or "none" where the tower's vectors are those of the shared space, W = D.
        projection_bias: whether the linear projection has a bias; the released EVA02 students' has.
        adaptor_norm: whether the adaptor brings teacher vectors to unit length; the released SigLIP2's does not.
    """

    model_type = "llm2clip"
    sub_configs = {"vision_config": AutoConfig}  # noqa: RUF012  (transformers reads the class attribute)

    def __init__(
        self,
        vision_config: Any = None,
        tower_dim: int = 768,
        teacher_dim: int = 4096,
        projection_dim: int = 1280,
        adaptor_blocks: int = 4,
        pooling: str = "pooler",
        image_size: int = 224,
        image_mean: tuple[float, ...] = CLIP_MEAN,
        image_std: tuple[float, ...] = CLIP_STD,
        loss: str = "softmax",
        projection: str = "linear",
        projection_bias: bool = False,
        adaptor_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        if vision_config is None:
            vision_config = {"model_type": "clip_vision_model"}
        if isinstance(vision_config, dict):
            settings = dict(vision_config)
            vision_config = AutoConfig.for_model(settings["model_type"]).__class__.from_dict(settings)
        self.vision_config = vision_config
        self.tower_dim, self.teacher_dim, self.projection_dim = tower_dim, teacher_dim, projection_dim
        self.adaptor_blocks, self.pooling, self.image_size = adaptor_blocks, pooling, image_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.loss = loss
        self.projection, self.projection_bias, self.adaptor_norm = projection, projection_bias, adaptor_norm
        super().__init__(**kwargs)


class Student(PreTrainedModel):
    """A vision tower and an adaptor in one space, with a learnable temperature.

    Args:
        config: what it is made of.
        tower: a loaded tower; None builds one of random weights.

    Example:
        >>> from transformers import CLIPVisionConfig
        >>> tower = CLIPVisionConfig(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=1)
        >>> config = StudentModelConfig(tower, tower_dim=48, teacher_dim=16, projection_dim=8, image_size=32)
        >>> student = Student(config)  # of random weights; Student.from_pretrained(folder) opens a trained one
        >>> pixels, text_embeds = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.randn(5, 16)
        >>> image, text, scale = student(pixels, text_embeds)  # unit length
        >>> image.shape, text.shape, scale.shape
        (torch.Size([2, 8]), torch.Size([5, 8]), torch.Size([]))
    """

    config_class = StudentModelConfig
    pixel_mean: Tensor
    pixel_std: Tensor
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: StudentModelConfig, tower: Any = None) -> None:
        super().__init__(config)
        self.tower = build_tower(config.vision_config, pooling=config.pooling) if tower is None else tower
        self.visual_projection: nn.Module = nn.Identity()
        if config.projection == "linear":
            self.visual_projection = nn.Linear(config.tower_dim, config.projection_dim, bias=config.projection_bias)
        self.adaptor = Adaptor(
            config.teacher_dim,
            config.projection_dim,
            num_blocks=config.adaptor_blocks,
            normalize=config.adaptor_norm,
        )
        # One element, not zero dimensions: FSDP2 shards no scalars.
        sigmoid = config.loss == "sigmoid"
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10) if sigmoid else math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0)) if sigmoid else None  # SigLIP, arXiv 2303.15343
        self.register_buffer("pixel_mean", 255 * torch.tensor(config.image_mean).view(3, 1, 1))
        self.register_buffer("pixel_std", 255 * torch.tensor(config.image_std).view(3, 1, 1))
        self.post_init()
        # What FSDP shards as a unit. Those that transformers collects name text layers too, and accelerate wants to
        # find every one.
        blocks = (*self.adaptor.blocks, *(block for _, block in tower_blocks(self.tower)))
        self._no_split_modules = sorted({type(block).__name__ for block in blocks})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start `module` as the released code does: PyTorch's Linear, CLIP's projection (std W ** -0.5)."""
        if module is self.visual_projection and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.tower_dim**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> Student:
        """As every module's, but norms of a locked part of the tower keep their statistics."""
        super().train(mode)
        if mode:
            hold_locked_norms(self.tower)
        return self

    def get_input_embeddings(self) -> Any:
        """None: accelerate asks before it shards, and no table of tokens leads into a student."""
        return None

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Shared-space vectors [B, D] of images, not normalised.

        Args:
            pixel_values: [B, 3, H, W], either uint8 as decoded (normalised here, on the device) or floats that an
                image processor has normalised.
        """
        return self._image_features(pixel_values)

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        """What `get_image_features` gives; under FSDP2 that one gathers and drops weights, which forward must keep."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values - self.pixel_mean) / self.pixel_std
        pixel_values = pixel_values.to(self.adaptor.projection.weight.dtype)
        pooled = pooled_output(self.tower, pixel_values, pooling=self.config.pooling)
        return self.visual_projection(pooled)

    def get_text_features(self, text_embeds: Tensor) -> Tensor:
        """Shared-space vectors [B, D] of teacher vectors [B, T], not normalised."""
        return self.adaptor(text_embeds)

    def forward(self, pixel_values: Tensor, text_embeds: Tensor) -> tuple[Tensor, ...]:
        """Images and teacher vectors of their captions in the shared space.

        Returns:
            image [B, D] and text [B, D] of unit length, scale []; for the sigmoid loss also its bias [].
        """
        image = nn.functional.normalize(self._image_features(pixel_values).float(), dim=-1)
        text = nn.functional.normalize(self.adaptor(text_embeds).float(), dim=-1)
        scale = self.logit_scale.float().exp().sum()  # of one element; FSDP2 wants no views for outputs
        return (image, text, scale) if self.logit_bias is None else (image, text, scale, self.logit_bias.float().sum())

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the log of the scale in [0, MAX_LOGIT_SCALE]; call after each optimizer step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


AutoConfig.register(StudentModelConfig.model_type, StudentModelConfig, exist_ok=True)
AutoModel.register(StudentModelConfig, Student, exist_ok=True)
StudentModelConfig.register_for_auto_class()
Student.register_for_auto_class("AutoModel")
