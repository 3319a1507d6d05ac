"""Rows of other ranks: the mean of those that share an id (math.md, eq. 12), or the one row of a column.

Legend: rows [m_r, D] of this rank's keys, with ids [m_r]; wanted ids [n_r] of its queries; G ids that are needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.distributed.exchange import all_reduce, gather_rows
from fastclip.distributed.shards import Shards


@dataclass(frozen=True)
class Ids:
    """Of one side: this rank's ids [n_r], and those of all ranks [N]."""

    own: Tensor
    everyone: Tensor


def gather_ids(ids: Tensor | None, sizes: tuple[int, ...], shards: Shards) -> Ids | None:
    return None if ids is None else Ids(ids, gather_rows(ids, sizes, shards.group))


def mean_by_id(rows: Tensor, ids: Ids, wanted: Ids, own: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """([n_r, D], [n_r]): the mean of all ranks' rows with each wanted id; whether that is just the query's own key.

    own: the ids [n_r] of the queries' own keys. Of rows that are their id's only one nothing is sent, and their mean is
    left 0.
    """
    ordered = torch.sort(ids.everyone).values
    count = torch.searchsorted(ordered, wanted.own, right=True) - torch.searchsorted(ordered, wanted.own)
    alone = (count == 1) & (own == wanted.own)
    alone_everywhere = gather_rows(alone.to(torch.uint8), shards.rows, shards.group).bool()
    groups = torch.unique(wanted.everyone[~alone_everywhere])
    if len(groups) == 0:
        return rows.new_zeros(len(wanted.own), rows.shape[1]), alone
    return _sum_in_groups(rows, ids.own, wanted.own, groups, shards) / count[:, None], alone


def rows_of(rows: Tensor, columns: Tensor, everyone: Tensor, shards: Shards) -> Tensor:
    """[k, D]: the row of each of the columns [k], whoever has it, differentiable. everyone: what all ranks ask for."""
    own = torch.arange(len(rows), device=rows.device) + shards.columns(shards.rank).start
    return _sum_in_groups(rows, own, columns, torch.unique(everyone), shards)


def _sum_in_groups(rows: Tensor, ids: Tensor, wanted: Tensor, groups: Tensor, shards: Shards) -> Tensor:
    """The sums of all ranks' rows with each wanted id; groups [G]: all ids that any rank wants, sorted."""
    at_once = max(*shards.rows, *shards.cols)
    return _SumByGroup.apply(rows, _index(ids, groups), _index(wanted, groups), len(groups), at_once, shards.group)


def _index(ids: Tensor, groups: Tensor) -> Tensor:
    """Each id's place among the groups [G], which are sorted; G where it is none of them."""
    place = torch.searchsorted(groups, ids).clamp_max(len(groups) - 1)
    return torch.where(groups[place] == ids, place, len(groups))


class _SumByGroup(torch.autograd.Function):
    """For each query the sum of all ranks' rows in its group; the gradient goes the same way back.

    As many groups at a time as the largest rank has rows, so that the messages stay as small as its features.
    """

    @staticmethod
    def forward(ctx, rows, group_of_row, group_of_query, groups, at_once, group):
        ctx.save_for_backward(group_of_row, group_of_query)
        ctx.sizes = groups, at_once, group
        return _sum_by_group(rows, group_of_row, group_of_query, *ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        group_of_row, group_of_query = ctx.saved_tensors
        return _sum_by_group(grad, group_of_query, group_of_row, *ctx.sizes), *(None,) * 5


def _sum_by_group(rows: Tensor, source: Tensor, target: Tensor, groups: int, at_once: int, group) -> Tensor:
    out = rows.new_zeros(len(target), rows.shape[1])
    for first in range(0, groups, at_once):
        some = min(at_once, groups - first)
        put, take = (
            (place - first).where((place >= first) & (place < first + some), some) for place in (source, target)
        )
        # index_put, unlike index_add, adds in a fixed order on every device. The last row takes what is none of these.
        total = rows.new_zeros(some + 1, rows.shape[1]).index_put((put,), rows, accumulate=True)
        total[some] = 0.0
        out += all_reduce(total, group)[take]
    return out
