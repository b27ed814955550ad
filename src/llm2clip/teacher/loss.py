"""The contrastive loss between captions, with cached gradients and false negatives left out.

B pairs on this process, W processes, D the teacher's width, K text columns (query, positive, perhaps negative).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, all_gather_with_grad
from torch import Tensor, nn


class CaptionLoss(CachedLossMixin, nn.Module):
    """Each query must find its positive among the positives and negatives of all pairs of the step, on all processes.

    Cross-entropy over `scale * cosine`, query to text, as in supervised SimCSE and the official code. With more texts
    than `micro_batch_size`, the gradients of the vectors are cached (https://arxiv.org/abs/2101.06983): memory for
    one micro-batch, and the same loss and gradient as in one go.

    Args:
        model: the SentenceTransformer in training (under DDP, the trainer puts the wrapped one in).
        scale: multiplies the cosine (1 / temperature).
        micro_batch_size: texts embedded at once; None for all.
        mask_duplicates: leave `false_negatives` out of the loss.

    Inputs: K feature dicts of B texts, and labels `[B, 2K]` int64 as `Task.draw` makes them (K text keys, K image
    numbers), or None to mask nothing.
    """

    def __init__(
        self, model: Any, *, scale: float = 50.0, micro_batch_size: int | None = None, mask_duplicates: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.mini_batch_size = micro_batch_size or 0  # of the gradient cache
        self.mask_duplicates = mask_duplicates

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        columns = list(sentence_features)
        labels = labels if self.mask_duplicates else None
        if 0 < self.mini_batch_size < len(columns) * len(columns[0]["input_ids"]):
            return self.forward_cached(columns, labels)
        vectors = [self.model(column)["sentence_embedding"] for column in columns]
        return pair_loss(vectors, labels, scale=self.scale)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of micro-batches of vectors; called by the gradient cache."""
        loss = pair_loss([torch.cat(column) for column in reps], labels, scale=self.scale)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def pair_loss(vectors: list[Tensor], labels: Tensor | None, *, scale: float) -> Tensor:
    """The mean over this process's queries of -log softmax(scale * cosine) at their positive.

    Args:
        vectors: K tensors `[B, D]`: queries, positives, and negatives if there are any.
        labels: `[B, 2K]` as `Task.draw` makes them, or None to mask nothing.
    """
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    # fp32: in bf16 the cosines of near captions fall together, and 50 times the rounding is no small thing.
    queries, *texts = [F.normalize(column.float(), dim=-1) for column in vectors]
    if world > 1:
        texts = [all_gather_with_grad(column) for column in texts]
    scores = scale * queries @ torch.cat(texts).T  # [B, (K-1)*W*B]
    own = torch.arange(len(queries), device=scores.device) + rank * len(queries)
    if labels is not None:
        everyone = all_gather(labels) if world > 1 else labels
        scores = scores.masked_fill(false_negatives(labels, everyone, own), float("-inf"))
    return F.cross_entropy(scores, own)


def false_negatives(labels: Tensor, everyone: Tensor, own: Tensor) -> Tensor:
    """Which texts must not be pushed away from which queries: bool `[B, (K-1)*W*B]`.

    A text is no negative of a query if it equals the query or its positive, or describes the query's image. The
    query's own positive is never masked.

    Args:
        labels: this process's labels `[B, 2K]`.
        everyone: the labels of all processes `[W*B, 2K]`.
        own: column of each query's positive `[B]`.
    """
    num_columns = labels.shape[1] // 2
    texts = everyone[:, 1:num_columns].T.flatten()  # [(K-1)*W*B] text keys, column after column
    images = everyone[:, num_columns + 1 :].T.flatten()
    same_text = (labels[:, 0, None] == texts) | (labels[:, 1, None] == texts)
    same_image = (labels[:, num_columns, None] == images) & (images >= 0)
    mask = same_text | same_image
    mask[torch.arange(len(labels), device=labels.device), own] = False
    return mask
