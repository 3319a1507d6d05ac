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


def ranks(S: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of each row and column beat its best correct pair (rows[n], cols[n]): int64 [N] and [M]."""
    correct = torch.full_like(S, -torch.inf)
    correct[rows, cols] = S[rows, cols]
    return (~(S <= correct.amax(1, keepdim=True))).sum(1), (~(S <= correct.amax(0))).sum(0)


def _softplus(gap: Tensor) -> Tensor:
    return F.softplus(gap, threshold=50.0)


def _lse(S: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where nothing is left (all entries -inf)."""
    empty = (S == -torch.inf).all(dim)
    safe = torch.where(empty.unsqueeze(dim), torch.zeros_like(S), S)
    return torch.where(empty, torch.full_like(safe.sum(dim), -torch.inf), torch.logsumexp(safe, dim))
