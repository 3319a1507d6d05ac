"""Which key belongs to each query, wherever it is: key i of the same rank, or the one that info_nce's labels name.

Legend: n_r queries, m_r keys on rank r; N, M over all ranks; key j of rank r is column m_0 + ... + m_(r-1) + j.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.distributed.exchange import all_rows, gather_rows
from fastclip.distributed.ids import rows_of
from fastclip.distributed.shards import Shards


@dataclass(frozen=True)
class Positives:
    """column [n_r] int64: the column of each query's key. labels [N]: those of all ranks, or None."""

    shards: Shards
    column: Tensor
    labels: Tensor | None = None

    def entries(self, t: Tensor) -> Tensor:
        """[n_r, ...] from one entry per key t [m_r, ...]: the queries' keys', differentiable. O(M) memory."""
        if self.labels is None:
            return t[: len(self.column)]
        return all_rows(t, self.shards.cols, self.shards.group)[self.column]

    def rows(self, t: Tensor) -> Tensor:
        """entries() of rows t [m_r, D]: as much memory as the largest rank's rows take, not O(M D)."""
        if self.labels is None:
            return t[: len(self.column)]
        return rows_of(t, self.column, self.labels, self.shards)

    def everyone(self) -> Tensor:
        """[N]: the columns of all ranks' queries."""
        if self.labels is not None:
            return self.labels
        firsts = [self.shards.columns(rank).start for rank in range(self.shards.world)]
        shares = zip(firsts, self.shards.rows, strict=True)
        return torch.cat([torch.arange(first, first + n, device=self.column.device) for first, n in shares])


def own_keys(x: Tensor, shards: Shards) -> Positives:
    """Query i of x [n_r, D] belongs to key i of this rank."""
    return Positives(shards, shards.own_columns(x))


def labelled(labels: Tensor, shards: Shards) -> Positives:
    """labels [n_r] int64, in [0, M). Raises ValueError on every rank where one's are not.

    On a GPU the range is not read back: it is an assertion on the device.
    """
    everyone, keys = gather_rows(labels, shards.rows, shards.group), sum(shards.cols)
    inside = (everyone >= 0) & (everyone < keys)
    if everyone.device.type != "cpu":
        torch._assert_async(inside.all(), f"labels must lie in [0, {keys}), the keys of all ranks")
    elif not bool(inside.all()):
        parts = zip(everyone.split(shards.rows), inside.split(shards.rows), strict=True)
        told = [
            f"{int(part.min())} to {int(part.max())} on rank {rank}"
            for rank, (part, good) in enumerate(parts)
            if not bool(good.all())
        ]
        raise ValueError(f"labels must lie in [0, {keys}), the keys of all ranks in order, got {', '.join(told)}")
    return Positives(shards, labels, everyone)
