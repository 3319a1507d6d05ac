"""The softmax losses over the ranks of a group: each rank computes those of its own pairs.

Legend: x [n_r, D], y [m_r, D] this rank's queries and keys, query i with key i; N, M rows over all ranks.
Gradients, averaged over the ranks, are those of the whole batch's loss (docs/distributed.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip import backends
from fastclip.distributed.exchange import whole
from fastclip.distributed.gaps import gaps, own_side, soft_targets
from fastclip.distributed.ids import gather_ids
from fastclip.distributed.positives import labelled, own_keys
from fastclip.distributed.shards import Shards, agree, not_compiled, tensor_text
from fastclip.distributed.stats import statistics
from fastclip.softmax import (
    Gaps,
    LossStats,
    Options,
    cross_entropy,
    has_soft_targets,
    log_add,
    symmetric_cross_entropy,
)

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
    own, ids = own_keys(image, shards), gather_ids(ids, shards.rows, shards)
    pairs = gaps(image, text, scale, own, options, ids, ids)
    losses = symmetric_cross_entropy(pairs)
    if has_soft_targets(options, ids):
        by_image = soft_targets(image, text, scale, pairs.pos, own, options, ids, ids)
        by_text = soft_targets(text, image, scale, pairs.pos, own, options, ids, ids)
        losses = losses + 0.5 * (by_image + by_text)
    loss = reduce(losses, weight, reduction, scale.dtype, shards)
    return (loss, statistics(image, text, scale, own, options, pairs, losses)) if return_stats else loss


@not_compiled
def info_nce(check: Callable[[], tuple], form: InfoNCEForm, group: object) -> Tensor | tuple[Tensor, LossStats]:
    """fastclip.info_nce over the ranks of `group`; labels are columns of all ranks' keys in order.

    check: validates this rank's arguments and returns query, key, scale, labels, weight, ids, key_ids and options.
    """

    def describe(checked: tuple) -> tuple[int, int, str]:
        x, y, scale, labels, weight, ids, _, options = checked
        backends.choose(x, options.backend or "")
        tensors = tensor_text(query=x, key=y, scale=scale, labels=labels, weight=weight, ids=ids)
        return len(x), len(y), f"info_nce D={x.shape[1]} {tensors} {options} {form}"

    (query, key, scale, labels, weight, ids, key_ids, options), shards = agree(group, check, describe)
    positives = own_keys(query, shards) if labels is None else labelled(labels, shards)
    themselves = own_keys(query, shards.of_one_side(shards.rows))
    ids, key_ids = gather_ids(ids, shards.rows, shards), gather_ids(key_ids, shards.cols, shards)
    pairs = gaps(query, key, scale, positives, options, ids, key_ids)
    row_gap, col_gap = pairs.row_gap, pairs.col_gap
    if form.query_negatives:
        row_gap = log_add(row_gap, own_side(query, scale, themselves, pairs.pos, options))
    if form.key_negatives:
        among_keys = own_side(key, scale, positives, pairs.pos, options)
        row_gap, col_gap = (
            (row_gap, log_add(col_gap, among_keys)) if form.symmetric else (log_add(row_gap, among_keys), col_gap)
        )
    losses = cross_entropy(row_gap) + soft_targets(query, key, scale, pairs.pos, positives, options, ids, key_ids)
    if form.symmetric:
        losses = 0.5 * (losses + cross_entropy(col_gap))
        if has_soft_targets(options, ids):
            own_key = positives.rows(key.to(scale.dtype))
            own_ids = key_ids and gather_ids(key_ids.everyone[positives.column], shards.rows, shards)
            losses = losses + 0.5 * soft_targets(own_key, query, scale, pairs.pos, themselves, options, own_ids, ids)
    loss = reduce(losses, weight, form.reduction, scale.dtype, shards)
    if not form.return_stats:
        return loss
    return loss, statistics(query, key, scale, positives, options, Gaps(row_gap, col_gap, pairs.pos), losses)


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
