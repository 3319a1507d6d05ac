"""sentence-transformers' ranking losses without the N x M similarities: same names, constructors and results.

Every direction, partition mode, hardness mode and number of hard negatives is supported, with cos_sim or dot_score.

Legend: query [N, D] anchors; key [K N, D] candidates: the N positives first, then K - 1 blocks of N hard negatives,
row i of each block belonging to query i. S = scale * similarity(query, key). Gaps as in softmax.py: log-sums minus the
positive.
"""

import math

import torch
from torch import Tensor

from fastclip import checks, ops
from fastclip.softmax import Options, cross_entropy, gap, gaps, log_add, reduce, unit_rows

try:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim, dot_score
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("sentence_transformers"):
        raise
    raise ModuleNotFoundError(
        "fastclip.integrations.sentence_transformers needs sentence-transformers 6.2 or newer: "
        "pip install 'sentence-transformers>=6.2'"
    ) from error

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]

_NORMALIZE = {cos_sim: True, dot_score: False}
_SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
_OPTIONS = (
    "scale",
    "similarity_fct",
    "gather_across_devices",
    "directions",
    "partition_mode",
    "hardness_mode",
    "hardness_strength",
)


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """The loss of the same name, in memory linear in the batch.

    Raises ValueError for a similarity_fct other than cos_sim and dot_score, NotImplementedError for
    gather_across_devices=True.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        _check(self)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss, 0-d, of [anchors, positives, negatives...], each [N, D]. labels is not used."""
        _check(self)
        if len(embeddings) < 2:
            raise ValueError(f"embeddings must hold anchors and positives at least, got {len(embeddings)} of them")
        query, *docs = embeddings
        if any(doc.shape != query.shape for doc in docs):
            raise ValueError(f"all embeddings must have one shape [N, D], got {[tuple(e.shape) for e in embeddings]}")
        query, key = checks.features(query, torch.cat(docs), "anchors", "candidates", paired=False)
        return _ranking_loss(self, query, key)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """The loss of the same name: its gradient cache, with the loss over the whole batch in one piece."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.loss = MultipleNegativesRankingLoss(self.model, **{name: getattr(self, name) for name in _OPTIONS})

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the mini-batches' embeddings; with_backward differentiates it and returns it detached."""
        loss = self.loss.compute_loss_from_embeddings([torch.cat(rep) for rep in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss in both directions, one softmax each: CLIP's loss at a fixed scale."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs, **_SYMMETRIC)


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """CachedMultipleNegativesRankingLoss in both directions, one softmax each."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs, **_SYMMETRIC)


def _check(loss: losses.MultipleNegativesRankingLoss) -> None:
    if loss.similarity_fct not in _NORMALIZE:
        name = getattr(loss.similarity_fct, "__name__", repr(loss.similarity_fct))
        raise ValueError(f"similarity_fct must be sentence_transformers.util's cos_sim or dot_score, got {name}")
    if loss.gather_across_devices:
        raise NotImplementedError("gather_across_devices=True (the loss over several processes) is not built yet")


def _ranking_loss(loss: losses.MultipleNegativesRankingLoss, query: Tensor, key: Tensor) -> Tensor:
    """Mean of log Z_i - pos_i: Z_i one softmax over all directions ("joint"), or their geometric mean."""
    n, normalize, directions = len(query), _NORMALIZE[loss.similarity_fct], set(loss.directions)
    scale = checks.scalar(loss.scale, "scale", query)
    hardness = loss.hardness_strength if loss.hardness_mode else 0.0
    mode = loss.hardness_mode if hardness else None
    row_gap, col_gap, pos = _query_to_doc(mode, hardness, query, key, scale, normalize)
    if hardness and "doc_to_query" in directions:  # the hardness weights only what the queries see
        col_gap = gaps(query, key[:n], scale, None, Options(normalize)).col_gap

    if loss.partition_mode == "per_direction":
        both = "doc_to_query" in directions
        each = 0.5 * (cross_entropy(row_gap) + cross_entropy(col_gap)) if both else cross_entropy(row_gap)
        return reduce(each, None, "mean", scale.dtype)
    positives = 1
    if "query_to_query" in directions:
        row_gap = log_add(row_gap, _same_side_gap(query, query, scale, pos, normalize))
    if "doc_to_query" in directions:
        row_gap, positives = log_add(row_gap, col_gap), 2  # the positive pair stands in both directions
    if "doc_to_doc" in directions:
        row_gap = log_add(row_gap, _same_side_gap(key[:n], key, scale, pos, normalize))
    shift = math.log(positives)
    each = cross_entropy(row_gap - shift) + shift  # log(positives + e^gap)
    return reduce(each, None, "mean", scale.dtype)


def _query_to_doc(
    mode: str | None, hardness: float, query: Tensor, key: Tensor, scale: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(row gap, column gap, positive), each [N]; hardness adds hardness * cosine to the logits that mode names."""
    if mode in (None, "all_negatives") or len(key) == len(query):
        weight = 0.0 if mode == "hard_negatives" else hardness
        pairs = gaps(query, key, scale, None, Options(normalize, hardness=weight))
        return pairs.row_gap, pairs.col_gap, pairs.pos
    # A query's own hard negatives are weighted apart: K - 1 logits a row, left out of the quadratic part by id.
    n = len(query)
    in_batch = hardness if mode == "in_batch_negatives" else 0.0
    own_id = torch.arange(n, device=query.device)
    options = Options(normalize, ids_mode="ignore", hardness=in_batch)
    pairs = gaps(query, key, scale, None, options, own_id, own_id.repeat(len(key) // n))
    negatives = unit_rows(key[n:], normalize).reshape(-1, n, key.shape[1])
    cosine = (unit_rows(query, normalize) * negatives).sum(2)
    logits = scale * cosine
    if mode == "hard_negatives":
        logits = logits + hardness * cosine.detach()
    return log_add(pairs.row_gap, logits.logsumexp(0) - pairs.pos), pairs.col_gap, pairs.pos


def _same_side_gap(x: Tensor, y: Tensor, scale: Tensor, pos: Tensor, normalize: bool) -> Tensor:
    """[N]: log-sum of each row of x [N, D] with the rows of y [K N, D] that belong to other queries, minus pos."""
    own = torch.arange(len(x), device=x.device)
    mask = ops.NO_MASK
    if len(y) > len(x):
        limits = [scale.new_full((len(rows),), torch.inf) for rows in (x, y)]
        mask = ops.Mask(own, own.repeat(len(y) // len(x)), *limits)
    row_sum, _, row_shift, *_ = ops.similarity_sums(x, y, scale, own, normalize, None, mask)
    return gap(row_sum, row_shift, pos)
