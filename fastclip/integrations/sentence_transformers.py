"""sentence-transformers' ranking losses without the N x M similarities: same names, constructors and results.

Every direction, partition mode, hardness mode and number of hard negatives is supported, with cos_sim or dot_score, and
gather_across_devices over the default process group.

Legend: query [N, D] anchors; key [K N, D] candidates: the N positives first, then K - 1 blocks of N hard negatives,
row i of each block belonging to query i; over several ranks those of this one. S = scale * similarity(query, key). Gaps
as in softmax.py: log-sums minus the positive.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastclip import backends, checks
from fastclip.distributed import gaps as over_ranks
from fastclip.distributed.ids import gather_ids
from fastclip.distributed.positives import own_keys
from fastclip.distributed.shards import Shards, agree, not_compiled, tensor_text
from fastclip.softmax import (
    Gaps,
    Options,
    cross_entropy,
    gaps,
    log_add,
    reduce,
    symmetric_cross_entropy,
    unit_rows,
)

try:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score
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

    gather_across_devices: the candidates, and in the other directions the anchors, of all ranks of the default process
    group. As the library does, each rank returns the mean of its own anchors' losses, and gradients averaged over the
    ranks, as DDP does, are those of the ranks' mean. Ranks may have different numbers of rows.

    Raises ValueError for a similarity_fct other than cos_sim and dot_score, and where the ranks do not fit together.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        _check(self)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss, 0-d, of [anchors, positives, negatives...], each [N, D]. labels is not used."""
        _check(self)
        if self.gather_across_devices and torch.distributed.is_initialized():
            return _over_ranks(self, embeddings)
        query, key = _features(embeddings)
        if self.gather_across_devices:
            all_gather_with_grad(query)  # without processes this does nothing but give the library's own warning
        return _ranking_loss(self, query, key, None)


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


def _features(embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
    """query and key."""
    if len(embeddings) < 2:
        raise ValueError(f"embeddings must hold anchors and positives at least, got {len(embeddings)} of them")
    query, *docs = embeddings
    if any(doc.shape != query.shape for doc in docs):
        raise ValueError(f"all embeddings must have one shape [N, D], got {[tuple(e.shape) for e in embeddings]}")
    return checks.features(query, torch.cat(docs), "anchors", "candidates", paired=False)


@not_compiled
def _over_ranks(loss: losses.MultipleNegativesRankingLoss, embeddings: list[Tensor]) -> Tensor:
    def describe(features: tuple[Tensor, Tensor]) -> tuple[int, int, str]:
        query, key = features
        backends.choose(query, "")  # raises where none can run
        options = f"{len(embeddings)} columns D={query.shape[1]} {loss.get_config_dict()}"
        return len(query), len(key), f"MultipleNegativesRankingLoss {options} {tensor_text(query=query, key=key)}"

    features, shards = agree(None, lambda: _features(embeddings), describe)
    return _ranking_loss(loss, *features, shards)


def _ranking_loss(
    loss: losses.MultipleNegativesRankingLoss, query: Tensor, key: Tensor, shards: Shards | None
) -> Tensor:
    """Mean of log Z_i - pos_i: Z_i one softmax over all directions ("joint"), or their geometric mean.

    shards: the ranks whose anchors and candidates count; the mean is that of this rank's anchors.
    """
    n, normalize, directions = len(query), _NORMALIZE[loss.similarity_fct], set(loss.directions)
    scale = checks.scalar(loss.scale, "scale", query)
    hardness = loss.hardness_strength if loss.hardness_mode else 0.0
    mode = loss.hardness_mode if hardness else None
    row_gap, col_gap, pos = _query_to_doc(mode, hardness, query, key, scale, normalize, shards)
    if hardness and "doc_to_query" in directions:  # the hardness weights only what the queries see
        col_gap = _gaps(query, key[:n], scale, Options(normalize), shards).col_gap

    if loss.partition_mode == "per_direction":
        both = "doc_to_query" in directions
        each = symmetric_cross_entropy(Gaps(row_gap, col_gap, pos)) if both else cross_entropy(row_gap)
        return reduce(each, None, "mean", scale.dtype)
    positives = 1
    if "query_to_query" in directions:
        row_gap = log_add(row_gap, _same_side_gap(query, query, scale, pos, normalize, shards))
    if "doc_to_query" in directions:
        row_gap, positives = log_add(row_gap, col_gap), 2  # the positive pair stands in both directions
    if "doc_to_doc" in directions:
        row_gap = log_add(row_gap, _same_side_gap(key[:n], key, scale, pos, normalize, shards))
    shift = math.log(positives)
    each = cross_entropy(row_gap - shift) + shift  # log(positives + e^gap)
    return reduce(each, None, "mean", scale.dtype)


def _query_to_doc(
    mode: str | None, hardness: float, query: Tensor, key: Tensor, scale: Tensor, normalize: bool, shards: Shards | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(row gap, column gap, positive), each [N]; hardness adds hardness * cosine to the logits that mode names."""
    if mode in (None, "all_negatives") or len(key) == len(query):
        weight = 0.0 if mode == "hard_negatives" else hardness
        pairs = _gaps(query, key, scale, Options(normalize, hardness=weight), shards)
        return pairs.row_gap, pairs.col_gap, pairs.pos
    # A query's own hard negatives are weighted apart: K - 1 logits a row, left out of the quadratic part by id.
    n = len(query)
    in_batch = hardness if mode == "in_batch_negatives" else 0.0
    options = Options(normalize, ids_mode="ignore", hardness=in_batch)
    pairs = _gaps(query, key, scale, options, shards, leave_own_out=True)
    negatives = unit_rows(key[n:], normalize).reshape(-1, n, key.shape[1])
    cosine = (unit_rows(query, normalize) * negatives).sum(2)
    logits = scale * cosine
    if mode == "hard_negatives":
        logits = logits + hardness * cosine.detach()
    return log_add(pairs.row_gap, logits.logsumexp(0) - pairs.pos), pairs.col_gap, pairs.pos


def _same_side_gap(x: Tensor, y: Tensor, scale: Tensor, pos: Tensor, normalize: bool, shards: Shards | None) -> Tensor:
    """[N]: log-sum of each row of x [N, D] with the rows of y [K N, D] that belong to other queries, minus pos."""
    options = Options(normalize, ids_mode="ignore")
    pairs = _gaps(x, y, scale, options, shards, leave_own_out=len(y) > len(x))
    return pairs.row_gap + pairs.pos - pos


def _gaps(
    x: Tensor, y: Tensor, scale: Tensor, options: Options, shards: Shards | None, leave_own_out: bool = False
) -> Gaps:
    """softmax.gaps of x [N, D] and y [K N, D], whose row i belongs to x_i, as do rows i + N, i + 2 N, ... (own).

    leave_own_out: these are no negatives of x_i. options then have to say ids_mode="ignore".
    """
    own, times = torch.arange(len(x), device=x.device), len(y) // len(x)
    if shards is None:
        ids = (own, own.repeat(times)) if leave_own_out else (None, None)
        return gaps(x, y, scale, None, options, *ids)
    first, shards = sum(shards.rows[: shards.rank]), replace(shards, cols=tuple(times * n for n in shards.rows))
    x_ids = y_ids = None
    if leave_own_out:
        x_ids = gather_ids(own + first, shards.rows, shards)
        y_ids = gather_ids((own + first).repeat(times), shards.cols, shards)
    return over_ranks.gaps(x, y, scale, own_keys(x, shards), options, x_ids, y_ids)
