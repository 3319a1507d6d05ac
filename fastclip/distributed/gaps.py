"""fastclip/softmax.py over the ranks: gaps, soft targets and masks of this rank's pairs, with all ranks' negatives.

Legend: x [n_r, D], y [m_r, D] this rank's queries and keys; N, M rows over all ranks; Ids: ids.py.
"""

import torch
from torch import Tensor

from fastclip import ops, softmax
from fastclip.distributed.exchange import all_rows, gather_rows, sum_over_ranks
from fastclip.distributed.ids import Ids, mean_by_id
from fastclip.distributed.positives import Positives
from fastclip.distributed.sums import similarity_sums
from fastclip.softmax import Gaps, Options, has_soft_targets, unit_rows


def gaps(
    x: Tensor, y: Tensor, scale: Tensor, positives: Positives, options: Options, x_ids: Ids | None, y_ids: Ids | None
) -> Gaps:
    """softmax.gaps of this rank's pairs [n_r], with the negatives of all ranks."""
    x, y, scale, ratio = softmax.hardened(x, y, scale, options.hardness)
    mask = _mask(x, y, scale, positives, options, x_ids, y_ids)
    sums = similarity_sums(x, y, scale, positives.column, positives.shards, options.normalize, options.backend, mask)
    row_sum, col_sum, row_shift, col_shift, score = sums
    pos = softmax.own_logit(score, ratio)
    col_sum, col_shift = positives.entries(torch.stack([col_sum, col_shift], 1)).unbind(1)
    row_gap, col_gap = softmax.gap(row_sum, row_shift, pos), softmax.gap(col_sum, col_shift, pos)
    if positives.labels is not None:
        col_gap = softmax.log_add(col_gap, _sharing_a_key(score, positives, mask) - pos)
    return Gaps(row_gap, col_gap, pos)


def own_side(x: Tensor, scale: Tensor, positives: Positives, pos: Tensor, options: Options) -> Tensor:
    """[n_r]: log-sum of the similarities of each query's own row of x with all ranks' other rows of x, minus pos.

    x: the keys that `positives` tells of, or the queries themselves, each of which is its own.
    """
    shards = positives.shards.of_one_side(positives.shards.cols)
    sums = similarity_sums(x, x, scale, shards.own_columns(x), shards, options.normalize, options.backend, ops.NO_MASK)
    total, shift = positives.entries(torch.stack([sums[0], sums[2]], 1)).unbind(1)
    return softmax.gap(total, shift, pos)


def soft_targets(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pos: Tensor,
    positives: Positives,
    options: Options,
    x_ids: Ids | None,
    y_ids: Ids | None,
) -> Tensor | float:
    """softmax.soft_targets of this rank's rows [n_r], with the matches and the mean of all ranks' keys."""
    if not has_soft_targets(options, x_ids):
        return 0.0
    eps, shards, added = options.label_smoothing, positives.shards, 0.0
    xn, yn = unit_rows(x, options.normalize), unit_rows(y, options.normalize)
    if x_ids is not None and options.ids_mode == "positive":
        center, alone = mean_by_id(yn, y_ids, x_ids, y_ids.everyone[positives.column], shards)
        added = (1.0 - eps) * torch.where(alone, 0.0, pos - scale * (xn * center).sum(1))
    if eps:
        mean = sum_over_ranks(yn.sum(0), shards.group) / sum(shards.cols)
        added = added + eps * (pos - scale * (xn * mean).sum(1))
    return added


def _mask(x, y, scale, positives: Positives, options: Options, x_ids: Ids | None, y_ids: Ids | None) -> ops.Mask:
    """softmax._mask with this rank's rows and all ranks' columns."""
    ignore, margin = x_ids is not None and options.ids_mode == "ignore", options.false_negative_margin
    if not ignore and margin is None:
        return ops.NO_MASK
    shards = positives.shards
    keys = sum(shards.cols)
    row_ids = x_ids.own if ignore else torch.zeros(len(x), dtype=torch.int64, device=x.device)
    col_ids = y_ids.everyone if ignore else torch.ones(keys, dtype=torch.int64, device=x.device)
    row_limit, col_limit = scale.new_full((len(x),), torch.inf), scale.new_full((keys,), torch.inf)
    if margin is not None:
        with torch.no_grad():
            xn, own = unit_rows(x, options.normalize), positives.rows(unit_rows(y, options.normalize))
            row_limit = scale * ((xn * own).sum(1) + margin)
            limits = gather_rows(row_limit, shards.rows, shards.group)
            # A key shared by several queries keeps the strictest of their limits.
            col_limit = col_limit.scatter_reduce(0, positives.everyone(), limits, "amin")
    return ops.Mask(row_ids, col_ids, row_limit, col_limit)


def _sharing_a_key(score: Tensor, positives: Positives, mask: ops.Mask) -> Tensor:
    """softmax.sharing_a_key of this rank's queries [n_r]: the other queries for the same key may be anywhere."""
    shards = positives.shards
    scores = all_rows(score, shards.rows, shards.group)
    if mask.row_ids is not None:
        mask = mask._replace(row_ids=gather_rows(mask.row_ids, shards.rows, shards.group))
    others = softmax.sharing_a_key(scores, positives.labels, sum(shards.cols), mask)
    return others.split(shards.rows)[shards.rank]
