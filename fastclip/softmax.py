"""What the softmax losses share: gaps, soft targets and masks, all O(N D) around the one quadratic operator.

Legend: x [N, D] queries, y [M, D] keys; positive [N] the key of each query; S = scale x^ y^T.
row_gap_i: log-sum of query i's negatives minus its positive; softplus(row_gap_i) is its cross-entropy (math.md, eq. 4).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import checks, ops
from fastclip.registry import with_signature


@dataclass(frozen=True)
class Options:
    """How a softmax loss treats its pairs; the losses' keyword arguments of the same names."""

    normalize: bool = True
    label_smoothing: float = 0.0
    ids_mode: str = "positive"
    false_negative_margin: float | None = None
    hardness: float = 0.0
    backend: str | None = None


@dataclass(frozen=True)
class Gaps:
    """Of each query [N]: the gap of its row, the gap of its positive key's column, and the positive's logit."""

    row_gap: Tensor
    col_gap: Tensor
    pos: Tensor


@dataclass(frozen=True)
class LossStats:
    """By-products of one batch, detached. float32 (float64 for float64 features), natural log.

    image_lse, text_lse [N]: log-sum-exp of each image's row and each text's column of S (queries and keys alike),
        over the pairs that the loss counts.
    losses [N]: each pair's loss before weight and reduction.
    image_accuracy, text_accuracy 0-d in [0, 1]: share of images (texts) whose own text (image) no other one beats.
    mean_rank 0-d: how many candidates beat the positive, averaged over both directions; 0 is perfect.
    """

    image_lse: Tensor
    text_lse: Tensor
    losses: Tensor
    image_accuracy: Tensor
    text_accuracy: Tensor
    mean_rank: Tensor


def gaps(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor | None,
    options: Options,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
) -> Gaps:
    """The gaps of all pairs, differentiable in x, y and scale. positive None: query i belongs to key i, M >= N."""
    columns = torch.arange(len(x), device=x.device) if positive is None else positive
    x, y, scale, ratio = hardened(x, y, scale, options.hardness)
    mask = _mask(x, y, scale, columns, options, x_ids, y_ids)
    sums = ops.similarity_sums(x, y, scale, columns, options.normalize, options.backend, mask)
    row_sum, col_sum, row_shift, col_shift, score = sums
    pos = own_logit(score, ratio)
    if positive is not None or len(y) > len(x):
        at = slice(len(x)) if positive is None else positive
        col_sum, col_shift = col_sum[at], col_shift[at]
    row_gap, col_gap = _Gaps.apply(row_sum, row_shift, col_sum, col_shift, pos)
    if positive is not None:
        col_gap = log_add(col_gap, sharing_a_key(score, positive, len(y), mask) - pos)
    return Gaps(row_gap, col_gap, pos)


def hardened(x: Tensor, y: Tensor, scale: Tensor, hardness: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, y and scale under which negatives count exp(hardness cos) times, a constant, and scale / (scale + hardness).

    The sums are those of a larger scale, the gradients of the features those of the true one (math.md, eq. 13).
    """
    if not hardness:
        return x, y, scale, None
    ratio = (scale / (scale + hardness)).detach()
    return _ScaleGradient.apply(x, ratio), _ScaleGradient.apply(y, ratio), scale + hardness, ratio


def own_logit(score: Tensor, ratio: Tensor | None) -> Tensor:
    """The positives' logits at the true scale, from those at hardened()'s."""
    return score if ratio is None else score + (score * (ratio - 1.0)).detach()


def gap(total: Tensor, shift: Tensor, pos: Tensor) -> Tensor:
    """log total + shift - pos [N] (math.md, eq. 4): three numbers near 50 whose sum is near 0 as a rule.

    So from here to the loss everything is float64, O(N) of it, except on MPS, which has none.
    """
    # One formula, in one node; the second half is not asked for.
    return _Gaps.apply(total, shift, total, shift, pos)[0]


def cross_entropy(gap: Tensor) -> Tensor:
    # log1p(exp(gap)) keeps its relative accuracy for a gap of -30 (math.md, eq. 4); torch's default threshold of 20
    # would drop the last 2e-9 in float64.
    return F.softplus(gap, threshold=50.0)


def symmetric_cross_entropy(pairs: Gaps) -> Tensor:
    """[N]: each pair's cross-entropy in its row and in its column, averaged (math.md, eq. 3)."""
    return _SymmetricCrossEntropy.apply(pairs.row_gap, pairs.col_gap)


def log_sum(total: Tensor) -> Tensor:
    """log(total), with -inf and a zero gradient where a pair has no negatives and total is exactly 0."""
    empty = total == 0
    return torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1.0, total)))


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), with a zero gradient, not NaN, where both are -inf."""
    top = torch.maximum(a, b).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    return log_sum(torch.exp(a - top) + torch.exp(b - top)) + top


def soft_targets(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pos: Tensor,
    positive: Tensor | None,
    options: Options,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
) -> Tensor | float:
    """[N]: what several positives and label smoothing add to each row's cross-entropy (math.md, eq. 5 and 12).

    The target of row i is (1 - e) uniform over its matches + e uniform over all keys, so that its loss is the
    cross-entropy with the own positive + (1 - e) (pos - mean of S over the matches) + e (pos - mean of S).
    """
    if not has_soft_targets(options, x_ids):
        return 0.0
    eps, several = options.label_smoothing, x_ids is not None and options.ids_mode == "positive"
    xn, yn = unit_rows(x, options.normalize), unit_rows(y, options.normalize)
    added = 0.0
    if several:
        center, count = _mean_by_id(yn, y_ids, x_ids)
        own = y_ids[: len(x)] if positive is None else y_ids[positive]
        alone = (count == 1) & (own == x_ids)  # exactly 0 then, which two ways of summing would not give
        added = (1.0 - eps) * torch.where(alone, 0.0, pos - scale * (xn * center).sum(1))
    if eps:
        # Not a matrix product: autocast would round that to its own dtype.
        added = added + eps * (pos - scale * (xn * yn.mean(0)).sum(1))
    return added


def has_soft_targets(options: Options, ids: object | None) -> bool:
    return bool(options.label_smoothing) or (ids is not None and options.ids_mode == "positive")


def unit_rows(x: Tensor, normalize: bool) -> Tensor:
    x = x.to(checks.accumulation_dtype(x.dtype))
    return F.normalize(x, dim=1) if normalize else x


def reduce(losses: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    """losses [N] times weight [N]; "mean" divides by the weights' sum. Rounded to dtype at the end."""
    if weight is not None:
        losses = losses * weight
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean":
        losses = losses.mean() if weight is None else losses.sum() / weight.sum()
    return losses.to(dtype)


def _mask(x, y, scale, positive, options: Options, x_ids, y_ids) -> ops.Mask:
    """Pairs that are no negatives: equal ids in mode "ignore", and scores above the positive's by the margin."""
    ignore, margin = x_ids is not None and options.ids_mode == "ignore", options.false_negative_margin
    if not ignore and margin is None:
        return ops.NO_MASK
    if not ignore:
        x_ids, y_ids = positive.new_zeros(len(x)), positive.new_ones(len(y))
    row_limit = torch.full((len(x),), torch.inf, dtype=scale.dtype, device=x.device)
    col_limit = torch.full((len(y),), torch.inf, dtype=scale.dtype, device=x.device)
    if margin is not None:
        with torch.no_grad():
            xn, yn = unit_rows(x, options.normalize), unit_rows(y, options.normalize)
            row_limit = scale * ((xn * yn[positive]).sum(1) + margin)
            # A key shared by several queries keeps the strictest of their limits.
            col_limit = col_limit.scatter_reduce(0, positive, row_limit, "amin")
    return ops.Mask(x_ids, y_ids, row_limit, col_limit)


@with_signature
class _Gaps(torch.autograd.Function):
    """gap() of rows and columns in one node; a sum of exactly 0 (no negatives) gives -inf and a zero gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(row_sum, row_shift, col_sum, col_shift, pos):
        wide = pos.dtype if pos.device.type == "mps" else torch.float64
        pos = pos.to(wide)
        row_gap = torch.log(row_sum.to(wide)) + (row_shift.to(wide) - pos)
        return row_gap, torch.log(col_sum.to(wide)) + (col_shift.to(wide) - pos)

    @staticmethod
    def setup_context(ctx, inputs, output):
        row_sum, _, col_sum, _, _ = inputs
        ctx.save_for_backward(row_sum, col_sum)

    @staticmethod
    def backward(ctx, row_grad, col_grad):
        by_sum = [
            torch.where(total == 0, 0.0, grad / total).to(total.dtype)
            for grad, total in zip((row_grad, col_grad), ctx.saved_tensors, strict=True)
        ]
        return by_sum[0], None, by_sum[1], None, -(row_grad + col_grad).to(by_sum[0].dtype)


@with_signature
class _SymmetricCrossEntropy(torch.autograd.Function):
    """The average of two cross_entropy() in one node."""

    generate_vmap_rule = True

    @staticmethod
    def forward(row_gap, col_gap):
        return (cross_entropy(row_gap) + cross_entropy(col_gap)).mul_(0.5)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        half = 0.5 * grad
        row_gap, col_gap = ctx.saved_tensors
        return half * torch.sigmoid(row_gap), half * torch.sigmoid(col_gap)


class _ScaleGradient(torch.autograd.Function):
    """x, with factor (0-d) times its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).to(grad.dtype), None


def sharing_a_key(score: Tensor, positive: Tensor, keys: int, mask: ops.Mask) -> Tensor:
    """[N]: log-sum of the other queries' scores [N] for the same positive key, -inf where there is none.

    They are negatives in the key's column, which the operator leaves out with all positives. In float64, because each
    query's own term is taken out of its key's total.
    """
    wide = score.double()
    top = wide.new_full((keys,), -torch.inf).scatter_reduce(0, positive, wide.detach(), "amax")[positive]
    own = torch.exp(wide - top)
    if mask.row_ids is not None:
        own = torch.where((mask.row_ids == mask.col_ids[positive]) | (score > mask.col_limit[positive]), 0.0, own)
    total = own.new_zeros(keys).index_put((positive,), own, accumulate=True)[positive]
    queries = positive.new_zeros(keys).index_put((positive,), torch.ones_like(positive), accumulate=True)[positive]
    others = torch.where(queries > 1, (total - own).clamp_min(0.0), 0.0)
    return log_sum(others) + top


def _mean_by_id(rows: Tensor, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the rows [M, D] with each wanted id [N], and how many there are: ([N, D], [N])."""
    both = torch.cat([ids, wanted])
    order = torch.argsort(both, stable=True)
    starts = both[order].diff(prepend=both[order[:1]]) != 0
    group = torch.empty_like(both).scatter(0, order, starts.cumsum(0))  # fewer groups than entries: no size to wait for
    of_rows, of_wanted = group[: len(ids)], group[len(ids) :]
    # index_put, unlike index_add, adds in a fixed order on every device.
    total = rows.new_zeros(len(both), rows.shape[1]).index_put((of_rows,), rows, accumulate=True)
    count = rows.new_zeros(len(both)).index_put((of_rows,), rows.new_ones(len(ids)), accumulate=True)
    return total[of_wanted] / count[of_wanted, None], count[of_wanted]
