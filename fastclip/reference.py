"""The dense definition of truth: slow, plain, holds the N x M matrix, any dtype (meant for float64).

Legend: x [N, D] and y [M, D] features, S [N, M] logits, positive [N] the column of each row's positive.
The equations are docs/math.md's. Every fast path is compared with these functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(x: Tensor, y: Tensor, scale: Tensor | float, *, normalize: bool = True) -> Tensor:
    """S = scale * x^ y^T (math.md, eq. 1)."""
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return scale * (x @ y.T)


def gaps(S: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Row gap [N] and column gap [N] of each pair: the log-sum-exp of its negatives minus its positive (eq. 4).

    softplus(gap) is the pair's cross-entropy, accurate relative to itself however small: the positive is masked
    out before the sum, so that nothing of the size of S cancels.
    """
    rows = torch.arange(S.shape[0], device=S.device)
    pos = S[rows, positive]
    is_positive = torch.zeros_like(S, dtype=torch.bool)
    is_positive[rows, positive] = True
    negatives = S.masked_fill(is_positive, -torch.inf)
    return _lse(negatives, 1) - pos, _lse(negatives, 0)[positive] - pos


def clip_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Equals 1/2 cross_entropy(S, arange(N)) + 1/2 cross_entropy(S.T, arange(N)) (eq. 3 and 5)."""
    S = logits(x, y, scale, normalize=normalize)
    row_gap, col_gap = gaps(S, torch.arange(len(S), device=S.device))
    losses = 0.5 * (_softplus(row_gap) + _softplus(col_gap))
    if label_smoothing:
        losses = losses + label_smoothing * (S.diagonal() - 0.5 * (S.mean(1) + S.mean(0)))
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (len(S) if weight is None else weight.sum())


def info_nce(
    query: Tensor,
    key: Tensor,
    scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    symmetric: bool = False,
    query_negatives: bool = False,
    key_negatives: bool = False,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    ids_mode: str = "positive",
    false_negative_margin: float | None = None,
    hardness: float = 0.0,
) -> Tensor:
    """One loss per query [N]: info_nce with reduction="none", from the whole matrix (eq. 4, 5, 10, 12 and 13)."""
    if normalize:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    labels = torch.arange(len(query), device=query.device) if labels is None else labels
    options = (label_smoothing, ids_mode, false_negative_margin, hardness)
    among_queries = (scale * query @ query.T).fill_diagonal_(-torch.inf) if query_negatives else None
    among_keys = (scale * key @ key.T).fill_diagonal_(-torch.inf)[labels] if key_negatives else None
    in_rows = [among_queries, None if symmetric else among_keys]
    losses = _one_side(query @ key.T, scale, labels, ids, key_ids, options, in_rows)
    if not symmetric:
        return losses
    own_ids = None if key_ids is None else key_ids[labels]
    own = torch.arange(len(query), device=query.device)
    columns = _one_side(key[labels] @ query.T, scale, own, own_ids, ids, options, [among_keys])
    return 0.5 * (losses + columns)


def siglip_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    normalize: bool = True,
    ids: Tensor | None = None,
    ids_mode: str = "positive",
) -> Tensor:
    """One loss per row [N]: sum_j softplus(-z_ij (S_ij + bias)) (eq. 11)."""
    t = logits(x, y, scale, normalize=normalize) + bias
    z = -torch.ones_like(t)
    if ids is not None:
        z[ids[:, None] == ids] = 1.0 if ids_mode == "positive" else 0.0
    z.fill_diagonal_(1.0)
    return (z.abs() * _softplus(-z * t)).sum(1)


def distill_loss(S: Tensor, T: Tensor) -> Tensor:
    """0-d: cross-entropy of the student's logits S [N, N] against the teacher's T, mean of both sides (eq. 14)."""
    rows, cols = T.softmax(1) * S.log_softmax(1), T.softmax(0) * S.log_softmax(0)
    return -0.5 * (rows.sum(1).mean() + cols.sum(0).mean())


def ranks(S: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of each row and column beat its best correct pair (rows[n], cols[n]): int64 [N] and [M]."""
    correct = torch.full_like(S, -torch.inf)
    correct[rows, cols] = S[rows, cols]
    return (~(S <= correct.amax(1, keepdim=True))).sum(1), (~(S <= correct.amax(0))).sum(0)


def _one_side(cosine, scale, positive, ids, other_ids, options, more_negatives) -> Tensor:
    """[N]: the cross-entropy of each row of scale * cosine, with the options of a softmax loss."""
    smoothing, ids_mode, margin, hardness = options
    S = scale * cosine
    own = F.one_hot(positive, S.shape[1]).bool()
    pos = S[own]
    match = own if ids is None else ids[:, None] == other_ids
    left_out = own.clone()
    if ids_mode == "ignore":
        left_out |= match
    if margin is not None:
        left_out |= cosine > cosine[own][:, None] + margin
    negatives = (S + hardness * cosine.detach()).masked_fill(left_out, -torch.inf)
    negatives = torch.cat([negatives, *(more for more in more_negatives if more is not None)], dim=1)
    targets = (match if ids_mode == "positive" else own).to(S.dtype)
    targets = (1.0 - smoothing) * targets / targets.sum(1, keepdim=True) + smoothing / S.shape[1]
    return _softplus(_lse(negatives, 1) - pos) + pos - (targets * S).sum(1)


def _softplus(gap: Tensor) -> Tensor:
    return F.softplus(gap, threshold=50.0)


def _lse(S: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where nothing is left (all entries -inf)."""
    empty = (S == -torch.inf).all(dim)
    safe = torch.where(empty.unsqueeze(dim), torch.zeros_like(S), S)
    return torch.where(empty, torch.full_like(safe.sum(dim), -torch.inf), torch.logsumexp(safe, dim))
