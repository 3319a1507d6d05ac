"""The softmax losses over the ranks of a group: each rank computes those of its own pairs.

Legend: x [n_r, D], y [m_r, D] this rank's queries and keys, query i with key i; N, M rows over all ranks.
Gradients, averaged over the ranks, are those of the whole batch's loss (docs/distributed.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastclip import backends, ops, softmax
from fastclip.distributed.exchange import all_reduce, gather_rows, sum_over_ranks, whole
from fastclip.distributed.ids import Ids, gather_ids, mean_by_id
from fastclip.distributed.ring import blocks
from fastclip.distributed.shards import Shards, agree, not_compiled, tensor_text
from fastclip.distributed.sums import similarity_sums
from fastclip.softmax import Gaps, LossStats, Options, cross_entropy, unit_rows

# What a loss function has checked: x, y, scale, weight, ids, options
Checked = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Options]


@dataclass(frozen=True)
class InfoNCEForm:
    """Those of info_nce's arguments that say which sums make up the loss, and what is returned."""

    symmetric: bool
    query_negatives: bool
    key_negatives: bool
    reduction: str
    return_stats: bool


@not_compiled
def clip_loss(
    check: Callable[[], Checked], group: object, reduction: str, return_stats: bool
) -> Tensor | tuple[Tensor, LossStats]:
    """fastclip.clip_loss over the ranks of `group`. check: validates this rank's arguments and returns them."""

    def describe(checked: Checked) -> tuple[int, int, str]:
        x, y, scale, weight, ids, options = checked
        backends.choose(x, options.backend or "")  # raises where it cannot run
        tensors = tensor_text(image=x, text=y, scale=scale, weight=weight, ids=ids)
        return len(x), len(y), f"clip_loss D={x.shape[1]} {tensors} reduction={reduction} {options} {return_stats=}"

    (image, text, scale, weight, ids, options), shards = agree(group, check, describe)
    ids = gather_ids(ids, shards.rows, shards)
    pairs = gaps(image, text, scale, shards, options, ids, ids)
    by_image = cross_entropy(pairs.row_gap) + soft_targets(image, text, scale, pairs.pos, shards, options, ids, ids)
    by_text = cross_entropy(pairs.col_gap) + soft_targets(text, image, scale, pairs.pos, shards, options, ids, ids)
    losses = 0.5 * (by_image + by_text)
    loss = reduce(losses, weight, reduction, scale.dtype, shards)
    return (loss, _stats(image, text, scale, shards, options, pairs, losses)) if return_stats else loss


@not_compiled
def info_nce(check: Callable[[], tuple], form: InfoNCEForm, group: object) -> Tensor | tuple[Tensor, LossStats]:
    """fastclip.info_nce over the ranks of `group`: a rank's query i belongs to its own key i.

    check: validates this rank's arguments and returns query, key, scale, labels, weight, ids, key_ids and options.
    """

    def describe(checked: tuple) -> tuple[int, int, str]:
        x, y, scale, labels, weight, ids, _, options = checked
        if labels is not None:
            raise NotImplementedError(
                "info_nce with both labels= and group= is not available: put each query's key first"
            )
        backends.choose(x, options.backend or "")
        tensors = tensor_text(query=x, key=y, scale=scale, weight=weight, ids=ids)
        return len(x), len(y), f"info_nce D={x.shape[1]} {tensors} {options} {form}"

    (query, key, scale, _, weight, ids, key_ids, options), shards = agree(group, check, describe)
    ids, key_ids = gather_ids(ids, shards.rows, shards), gather_ids(key_ids, shards.cols, shards)
    of_queries, of_keys = replace(shards, cols=shards.rows), replace(shards, rows=shards.cols)
    pairs, n = gaps(query, key, scale, shards, options, ids, key_ids), len(query)
    row_gap, col_gap = pairs.row_gap, pairs.col_gap
    if form.query_negatives:
        row_gap = softmax.log_add(row_gap, _own_side(query, scale, pairs.pos, of_queries, options))
    if form.key_negatives:
        among_keys = _own_side(key, scale, pairs.pos, of_keys, options)
        if form.symmetric:
            col_gap = softmax.log_add(col_gap, among_keys)
        else:
            row_gap = softmax.log_add(row_gap, among_keys)
    losses = cross_entropy(row_gap) + soft_targets(query, key, scale, pairs.pos, shards, options, ids, key_ids)
    if form.symmetric:
        own_ids = None if ids is None else gather_ids(key_ids.own[:n], shards.rows, shards)
        targets = soft_targets(key[:n], query, scale, pairs.pos, of_queries, options, own_ids, ids)
        losses = 0.5 * (losses + cross_entropy(col_gap) + targets)
    loss = reduce(losses, weight, form.reduction, scale.dtype, shards)
    if not form.return_stats:
        return loss
    return loss, _stats(query, key, scale, shards, options, Gaps(row_gap, col_gap, pairs.pos), losses)


def gaps(
    x: Tensor, y: Tensor, scale: Tensor, shards: Shards, options: Options, x_ids: Ids | None, y_ids: Ids | None
) -> Gaps:
    """softmax.gaps of this rank's pairs [n_r], with the negatives of all ranks."""
    x, y, scale, ratio = softmax.hardened(x, y, scale, options.hardness)
    mask = _mask(x, y, scale, shards, options, x_ids, y_ids)
    sums = similarity_sums(x, y, scale, shards, options.normalize, options.backend, mask)
    row_sum, col_sum, row_shift, col_shift, score = sums
    pos, n = softmax.own_logit(score, ratio), len(x)
    return Gaps(softmax.gap(row_sum, row_shift, pos), softmax.gap(col_sum[:n], col_shift[:n], pos), pos)


def soft_targets(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pos: Tensor,
    shards: Shards,
    options: Options,
    x_ids: Ids | None,
    y_ids: Ids | None,
) -> Tensor | float:
    """softmax.soft_targets of this rank's rows [n_r], with the matches and the mean of all ranks' keys."""
    eps, several = options.label_smoothing, x_ids is not None and options.ids_mode == "positive"
    if not eps and not several:
        return 0.0
    xn, yn = unit_rows(x, options.normalize), unit_rows(y, options.normalize)
    added = 0.0
    if several:
        center, alone = mean_by_id(yn, y_ids, x_ids, shards.rows, shards)
        added = (1.0 - eps) * torch.where(alone, 0.0, pos - scale * (xn * center).sum(1))
    if eps:
        mean = sum_over_ranks(yn.sum(0), shards.group) / sum(shards.cols)
        added = added + eps * (pos - scale * (xn * mean).sum(1))
    return added


def reduce(losses: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype, shards: Shards) -> Tensor:
    """softmax.reduce over the pairs of all ranks; "none" gives this rank's own [n_r]."""
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses.to(dtype)
    if reduction == "sum" or weight is None:
        total = whole(losses.sum(), shards.group)
        return (total if reduction == "sum" else total / sum(shards.rows)).to(dtype)
    total, weights = whole(torch.stack([losses.sum(), weight.sum().to(losses.dtype)]), shards.group)
    return (total / weights).to(dtype)


def _mask(x, y, scale, shards: Shards, options: Options, x_ids: Ids | None, y_ids: Ids | None) -> ops.Mask:
    """softmax._mask with this rank's rows and all ranks' columns."""
    ignore, margin = x_ids is not None and options.ids_mode == "ignore", options.false_negative_margin
    if not ignore and margin is None:
        return ops.NO_MASK
    keys = sum(shards.cols)
    row_ids = x_ids.own if ignore else torch.zeros(len(x), dtype=torch.int64, device=x.device)
    col_ids = y_ids.everyone if ignore else torch.ones(keys, dtype=torch.int64, device=x.device)
    row_limit, col_limit = scale.new_full((len(x),), torch.inf), scale.new_full((keys,), torch.inf)
    if margin is not None:
        with torch.no_grad():
            xn, yn = unit_rows(x, options.normalize), unit_rows(y[: len(x)], options.normalize)
            row_limit = scale * ((xn * yn).sum(1) + margin)
            extra = row_limit.new_full((len(y) - len(x),), torch.inf)
            col_limit = gather_rows(torch.cat([row_limit, extra]), shards.cols, shards.group)
    return ops.Mask(row_ids, col_ids, row_limit, col_limit)


def _own_side(x: Tensor, scale: Tensor, pos: Tensor, shards: Shards, options: Options) -> Tensor:
    """[n_r]: log-sum of each row's similarities with all ranks' other rows of x, minus pos."""
    sums = similarity_sums(x, x, scale, shards, options.normalize, options.backend, ops.NO_MASK)
    return softmax.gap(sums[0][: len(pos)], sums[2][: len(pos)], pos)


def _stats(x, y, scale, shards: Shards, options: Options, pairs: Gaps, losses: Tensor) -> LossStats:
    """Lists of this rank's pairs [n_r]; accuracies and the mean rank of the whole batch."""
    pos, n = pairs.pos.detach(), len(x)
    row_rank = _ranks(x, y, scale, shards, options)
    col_rank = _ranks(y[:n], x, scale, replace(shards, cols=shards.rows), options)
    sums = torch.stack([(row_rank == 0).sum(), (col_rank == 0).sum(), row_rank.sum(), col_rank.sum()])
    means = all_reduce(sums, shards.group).to(pos.dtype) / sum(shards.rows)
    return LossStats(
        image_lse=(pos + cross_entropy(pairs.row_gap.detach())).to(pos.dtype),
        text_lse=(pos + cross_entropy(pairs.col_gap.detach())).to(pos.dtype),
        losses=losses.detach().to(pos.dtype),
        image_accuracy=means[0],
        text_accuracy=means[1],
        mean_rank=0.5 * (means[2] + means[3]),
    )


def _ranks(x: Tensor, y: Tensor, scale: Tensor, shards: Shards, options: Options) -> Tensor:
    """[n_r]: how many of all ranks' rows y beat each of this rank's x's own."""
    rows = torch.arange(len(x), device=x.device)

    def rank_among(keys: Tensor, own: Tensor) -> Tensor:
        return ops.similarity_ranks(x, keys, scale, rows, own, options.normalize, options.backend)[0]

    if shards.mode == "gather":
        return rank_among(gather_rows(y, shards.cols, shards.group), shards.own_columns(x))
    among_own = rank_among(y, rows)
    total = among_own.clone()
    for block in blocks(y, shards):
        if not block.own:
            # A block of other ranks' keys holds no right answer to compare with, so that this rank's keys join it.
            total += rank_among(torch.cat([y.detach(), block.y]), rows) - among_own
    return total
