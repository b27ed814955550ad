"""Retrieval scores of vectors: recall@k both ways, caption retrieval accuracy, alignment, uniformity.

Pure functions of vectors and image ids, for any encoder. Every score is a cosine in float32. A rank is one plus the
number of wrong candidates that score at least as much as the best right one: a tie counts against the model, so an
encoder that gives one vector for everything scores nothing, and no order of the rows changes a result.

Letters: N queries, M gallery rows, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2clip.errors import UsageError

Vectors = np.ndarray | Tensor
Ids = Sequence[Hashable] | np.ndarray | Tensor

TIE = 1e-6
"""Cosines closer than this are equal: float32 products of one row differ by about 1e-7 with their place in a tile."""
TILE_ROWS, TILE_COLUMNS = 1024, 8192
"""Scores held at once: 32 MiB, and as much again for comparing them."""
PAIRS_AT_ONCE = 8192
"""Right pairs multiplied together: 84 MB at width 1,280."""
POOLS = ("all", "second")


def recall_at_k(
    query: Vectors, gallery: Vectors, query_ids: Ids, gallery_ids: Ids, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """The fraction of queries with a right gallery row among their k best, for each k.

    Args:
        query: [N, D], any float dtype, of any length.
        gallery: [M, D].
        query_ids: [N] image ids; a gallery row is right for a query if their ids are equal. Several may be.
        gallery_ids: [M] image ids.
        ks: the cut-offs.

    Raises:
        UsageError: if shapes do not match, a vector is not finite, or a query has no right row.

    Example:
        >>> recall_at_k(np.eye(3), np.eye(3)[[0, 1, 1]], ["a", "b", "c"], ["a", "b", "c"], ks=(1, 3))
        {1: 0.3333333333333333, 3: 1.0}
    """
    return recall(match(query, gallery, query_ids, gallery_ids, both=False).ranks, ks)


def recall_both_ways(
    query: Vectors, gallery: Vectors, query_ids: Ids, gallery_ids: Ids, ks: Sequence[int] = (1, 5, 10)
) -> tuple[dict[int, float], dict[int, float]]:
    """`recall_at_k` of query -> gallery and of gallery -> query, from one pass over the scores.

    Example:
        >>> recall_both_ways(np.eye(2), np.eye(2)[[0, 0, 1]], [0, 1], [0, 0, 1], ks=(1,))
        ({1: 1.0}, {1: 1.0})
    """
    found = match(query, gallery, query_ids, gallery_ids)
    return recall(found.ranks, ks), recall(found.ranks_back, ks)


def recall(ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """The fraction of `ranks` (from 1) that are at most k, for each k.

    >>> recall(np.array([1, 4, 11, 2]), ks=(1, 5))
    {1: 0.25, 5: 0.75}
    """
    return {int(k): float(np.mean(ranks <= k)) for k in ks}


class Match(NamedTuple):
    """What one pass over all scores of queries [N] and gallery rows [M] tells; P right pairs."""

    ranks: np.ndarray
    """[N], from 1: of each query's best right gallery row."""
    ranks_back: np.ndarray
    """[M], from 1: of each gallery row's best right query; [0] unless asked for."""
    rivals: np.ndarray
    """[N, k]: the cosines of each query's best wrong gallery rows, best first; -inf where there are fewer."""
    owners: np.ndarray
    """[P]: the query of each right pair."""
    cosines: np.ndarray
    """[P]."""


def match(
    query: Vectors, gallery: Vectors, query_ids: Ids, gallery_ids: Ids, *, both: bool = True, rivals: int = 0
) -> Match:
    """The ranks of both ways, and what mean average precision and the like are made of.

    Args:
        query: with gallery and ids as of `recall_at_k`.
        both: also rank the other way.
        rivals: how many of the best wrong gallery rows of each query are told.

    Raises:
        UsageError: as `recall_at_k`.

    Example:
        >>> match(np.eye(2), np.eye(2)[[0, 1, 1]], [0, 1], [0, 1, 0], rivals=1).rivals.tolist()
        [[0.0], [1.0]]
    """
    query_codes, gallery_codes = _codes(query_ids, gallery_ids)
    rows = _unit(query, len(query_codes), "query vectors")
    columns = _unit(gallery, len(gallery_codes), "gallery vectors").to(rows.device)
    if rows.shape[1] != columns.shape[1]:
        raise UsageError(f"query vectors have {rows.shape[1]} numbers, gallery vectors {columns.shape[1]}")
    right = _right_pairs(query_codes, gallery_codes)
    row_best, column_best, cosines = _best_right(rows, columns, *right)
    _check_answerable(row_best, query_ids, "query")
    if both:
        _check_answerable(column_best, gallery_ids, "gallery row")
    best = torch.full((len(rows), rivals), -torch.inf, device=rows.device)
    above, above_back = _count_wrong(rows, columns, right, row_best, column_best if both else None, best)
    ranks_back = 1 + above_back if both else above_back[:0]
    return Match(1 + above, ranks_back, best.cpu().numpy(), right[0].numpy(), cosines.cpu().numpy())


def best_columns(query: Vectors, gallery: Vectors, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the k gallery rows that score best for each query, best first, and their cosines: both [N, k].

    >>> best_columns(np.eye(2), np.array([[1.0, 1.0], [0.0, 2.0]]), 1)[0].tolist()
    [[0], [1]]
    """
    rows = _unit(query, len(query), "query vectors")
    columns = _unit(gallery, len(gallery), "gallery vectors").to(rows.device)
    numbers, cosines = [], []
    with _full_precision():
        for part in rows.split(TILE_ROWS):
            best, place = part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
            for j in range(0, len(columns), TILE_COLUMNS):
                scores, found = (part @ columns[j : j + TILE_COLUMNS].T).topk(min(k, len(columns) - j, TILE_COLUMNS))
                best, order = torch.cat([best, scores], 1).topk(min(k, best.shape[1] + scores.shape[1]))
                place = torch.cat([place, found + j], 1).gather(1, order)
            numbers.append(place.cpu().numpy())
            cosines.append(best.cpu().numpy())
    return np.concatenate(numbers), np.concatenate(cosines)


def caption_retrieval_accuracy(vectors: Vectors, image_ids: Ids, pool: str = "all") -> float:
    """CRA: the fraction of captions whose nearest other caption belongs to the same image (top-1, cosine).

    Args:
        vectors: [N, D] of captions.
        image_ids: [N].
        pool: "all": every caption that is not the image's only one seeks among all other captions. "second": the
            first caption of each image seeks among the second ones (paper, appendix D, which names no pool; an
            author's word on "first -> second" is in the project's issue 3). Images with one caption are left out.

    Raises:
        UsageError: if no image has two captions, shapes do not match, or a vector is not finite.

    Example:
        >>> caption_retrieval_accuracy(np.eye(2)[[0, 0, 1, 1]], ["a", "a", "b", "b"])
        1.0
    """
    if pool not in POOLS:
        raise UsageError(f"pool is {pool!r}; choose from {', '.join(POOLS)}")
    codes, _ = _codes(image_ids, image_ids)
    counts = np.bincount(codes, minlength=1)
    if counts.max() < 2:
        raise UsageError(f"caption retrieval needs images with two captions; none of {len(counts)} has two")
    if pool == "second":
        order = np.argsort(codes, kind="stable")
        first = np.flatnonzero(np.diff(codes[order], prepend=-1))
        first = first[counts >= 2]
        a, b = order[first], order[first + 1]
        return recall_at_k(vectors[a], vectors[b], codes[a], codes[b], (1,))[1]
    unit = _unit(vectors, len(codes), "vectors")
    row, column = _right_pairs(codes, codes)
    other = row != column
    best, *_ = _best_right(unit, unit, row[other], column[other])
    above, _ = _count_wrong(unit, unit, (row, column), best, None)
    return float(np.mean(above[counts[codes] > 1] == 0))


def similarity_profile(
    vectors: Vectors, image_ids: Ids, *, bins: int = 40, max_captions: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """How close captions of one image are, and how spread out all are.

    Alignment is the mean squared distance of positive pairs, uniformity the log of the mean of exp(-2 x squared
    distance) over all pairs (Wang and Isola, arXiv 2005.10242, equations 1 and 2); lower is better for both.

    Args:
        vectors: [N, D] of captions, taken at unit length.
        image_ids: [N]; two captions of one image are a positive pair, all others negative ones.
        bins: of the histograms, equally wide over cosines -1..1.
        max_captions: of larger sets, that many whole images' captions are drawn.
        seed: of that draw.

    Returns:
        `alignment`, `uniformity`, `positive_mean`, `negative_mean` (None where there is no pair), `edges` [bins + 1],
        `positive` and `negative`: [bins] numbers of pairs, and `captions`: how many were compared.
    """
    codes, _ = _codes(image_ids, image_ids)
    if len(codes) > max_captions:
        keep = _draw_images(codes, max_captions, seed)
        vectors, codes = vectors[keep], codes[keep]
    unit = _unit(vectors, len(codes), "vectors")
    totals = torch.zeros(2, bins + 3, dtype=torch.float64)  # positive and negative: histogram, sum, sum of exp, count
    with _full_precision():
        for i in range(0, len(codes), TILE_ROWS):
            scores = (unit[i : i + TILE_ROWS] @ unit.T).cpu()
            same = torch.as_tensor(codes[i : i + TILE_ROWS, None] == codes)
            other = ~same
            same[torch.arange(len(scores)), torch.arange(i, i + len(scores))] = False
            totals[0] += _pair_totals(scores[same], bins)
            totals[1] += _pair_totals(scores[other], bins)
    (positive, negative), sums, exponents, counts = totals[:, :bins], totals[:, -3], totals[:, -2], totals[:, -1]
    means = [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
    return {
        "captions": len(codes),
        "alignment": None if means[0] is None else round(2 - 2 * means[0], 6),
        "uniformity": round(float(torch.log(exponents.sum() / counts.sum())), 6) if counts.sum() else None,
        "positive_mean": None if means[0] is None else round(means[0], 6),
        "negative_mean": None if means[1] is None else round(means[1], 6),
        "edges": np.linspace(-1, 1, bins + 1).round(6).tolist(),
        "positive": [int(n) // 2 for n in positive],
        "negative": [int(n) // 2 for n in negative],
    }


def _pair_totals(cosines: Tensor, bins: int) -> Tensor:
    """[bins + 3]: histogram, sum, sum of exp(-2 distance^2), count; each pair comes twice, once from either side."""
    cosines = cosines.clamp(-1, 1)
    histogram = torch.histc(cosines, bins=bins, min=-1, max=1).double()
    sums = [cosines.sum(dtype=torch.float64), torch.exp(4 * cosines - 4).sum(dtype=torch.float64)]
    return torch.cat([histogram, torch.stack([*sums, torch.tensor(float(len(cosines)), dtype=torch.float64)])])


def _codes(query_ids: Ids, gallery_ids: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Ids of any kind as small whole numbers, the same for equal ids."""
    lists = [ids.tolist() if isinstance(ids, (np.ndarray, Tensor)) else ids for ids in (query_ids, gallery_ids)]
    number: dict[Hashable, int] = {}
    first, second = (np.array([number.setdefault(i, len(number)) for i in ids], dtype=np.int64) for ids in lists)
    return first, second


def _unit(vectors: Vectors, count: int, name: str) -> Tensor:
    """`vectors` [count, D] as float32 of unit length; a vector of zeros stays one."""
    tensor = torch.as_tensor(vectors)
    if tensor.ndim != 2 or len(tensor) != count:
        raise UsageError(f"{name} have shape {list(tensor.shape)} for {count} ids; expected [{count}, D]")
    if not count:
        raise UsageError(f"there are no {name}")
    norm = torch.linalg.vector_norm(tensor.float(), dim=1, keepdim=True)
    bad = count - int(torch.isfinite(norm).sum())
    if bad:
        raise UsageError(f"{bad} of {count} {name} hold NaN or infinity; the encoder that gave them is broken")
    return tensor.float() / norm.clamp_min(1e-12)


def _right_pairs(row_codes: np.ndarray, column_codes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Row and column of every right pair [P], rows rising."""
    order = np.argsort(column_codes, kind="stable")
    first = np.searchsorted(column_codes[order], row_codes, side="left")
    counts = np.searchsorted(column_codes[order], row_codes, side="right") - first
    row = np.repeat(np.arange(len(row_codes)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(row), torch.from_numpy(order[np.repeat(first, counts) + within])


def _best_right(rows: Tensor, columns: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best cosine of each row with a right column [N], the reverse [M], and of all pairs; -inf for none."""
    row, column = row.to(rows.device), column.to(rows.device)
    row_best = torch.full((len(rows),), -torch.inf, device=rows.device)
    column_best = torch.full((len(columns),), -torch.inf, device=rows.device)
    every = [rows.new_empty(0)]
    for r, c in zip(row.split(PAIRS_AT_ONCE), column.split(PAIRS_AT_ONCE), strict=True):
        cosines = (rows[r] * columns[c]).sum(1)
        row_best.scatter_reduce_(0, r, cosines, "amax")
        column_best.scatter_reduce_(0, c, cosines, "amax")
        every.append(cosines)
    return row_best, column_best, torch.cat(every)


def _count_wrong(
    rows: Tensor,
    columns: Tensor,
    right: tuple[Tensor, Tensor],
    row_best: Tensor,
    column_best: Tensor | None,
    rivals: Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """How many wrong columns score at least `row_best` in each row, and wrong rows `column_best` in each column.

    The best wrong cosines of each row go to `rivals` [N, k].
    """
    most = 0 if rivals is None else rivals.shape[1]
    limits = (row_best - TIE)[:, None]
    above = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    above_back = torch.zeros(len(columns), dtype=torch.int64, device=rows.device)
    with _full_precision():
        for i in range(0, len(rows), TILE_ROWS):
            start, end = torch.searchsorted(right[0], torch.tensor([i, i + TILE_ROWS])).tolist()
            row, column = (part[start:end].to(rows.device) for part in right)
            for j in range(0, len(columns), TILE_COLUMNS):
                scores = rows[i : i + TILE_ROWS] @ columns[j : j + TILE_COLUMNS].T
                inside = (column >= j) & (column < j + TILE_COLUMNS)
                scores[row[inside] - i, column[inside] - j] = -torch.inf  # only wrong ones are counted
                if rivals is not None and most:
                    here = torch.cat([rivals[i : i + TILE_ROWS], scores.topk(min(most, scores.shape[1])).values], 1)
                    rivals[i : i + TILE_ROWS] = here.topk(most).values
                # compared into floats: torch sums those some ten times faster than booleans
                hit = torch.ge(scores, limits[i : i + TILE_ROWS], out=torch.empty_like(scores))
                above[i : i + TILE_ROWS] += hit.sum(1).long()
                if column_best is not None:
                    torch.ge(scores, column_best[j : j + TILE_COLUMNS] - TIE, out=hit)
                    above_back[j : j + TILE_COLUMNS] += hit.sum(0).long()
    return above.cpu().numpy(), above_back.cpu().numpy()


def _draw_images(codes: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Row numbers of whole images, drawn until the next would go past `limit`; rising."""
    counts = np.bincount(codes)
    order = np.random.default_rng(seed).permutation(len(counts))
    taken = order[np.cumsum(counts[order]) <= limit]
    return np.flatnonzero(np.isin(codes, taken))


def _check_answerable(best: Tensor, ids: Ids, name: str) -> None:
    missing = torch.isneginf(best).nonzero()[:, 0].tolist()
    if missing:
        first = ids[missing[0]]
        raise UsageError(f"{len(missing)} of {len(best)} have no right answer, first {name} {first!r}; leave them out")


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products in true float32, whatever the training allowed itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
