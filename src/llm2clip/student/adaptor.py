"""The adaptor: teacher vectors [B, T] into the space shared with images [B, D]."""

from __future__ import annotations

from torch import Tensor, nn


class AdaptorBlock(nn.Module):
    """`x + Linear(2d -> d)(GELU(Linear(d -> 2d)(LayerNorm(x))))`, an inverted bottleneck as in FuseMix.

    Args:
        width: d, the width of what goes in and comes out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.shrink = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, d] with the block's correction added."""
        return x + self.shrink(nn.functional.gelu(self.expand(self.norm(x))))


class Adaptor(nn.Module):
    """L2 norm, residual blocks, LayerNorm, Linear to the shared width (paper, section 6.2 of the released code).

    The released weights expect vectors of unit length, so the norm is part of the adaptor and not of its callers.

    Args:
        teacher_dim: T, the width of a bank's vectors.
        projection_dim: D, the width of the shared space; 1280 in the paper.
        normalize: whether vectors are brought to unit length first; the released SigLIP2's are not.
        num_blocks: 4 in the paper; its Table 8 gives 76.7 (one), 76.8 (two), 77.9 (four) text-to-image.

    Example:
        >>> import torch
        >>> adaptor = Adaptor(teacher_dim=8, projection_dim=4, num_blocks=2)  # random weights, float32
        >>> adaptor(torch.ones(3, 8, dtype=torch.float16)).shape  # vectors of a bank, in any float dtype
        torch.Size([3, 4])
    """

    def __init__(self, teacher_dim: int, projection_dim: int, *, num_blocks: int = 4, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.blocks = nn.ModuleList(AdaptorBlock(teacher_dim) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(teacher_dim)
        self.projection = nn.Linear(teacher_dim, projection_dim)

    def forward(self, text_embeds: Tensor) -> Tensor:
        """Teacher vectors [B, T] as shared-space vectors [B, D], not normalised."""
        x = text_embeds.to(self.projection.weight.dtype)
        if self.normalize:
            x = nn.functional.normalize(x, dim=-1)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x))
