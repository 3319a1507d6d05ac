"""ops.similarity_sums over the ranks of a group: each rank its rows against all columns, once for both directions.

Legend: x [n_r, D], y [m_r, D] this rank's queries and keys; column [n_r] int64 the key of each query among all ranks'.
row_sum, row_shift, pos [n_r] and col_sum, col_shift [m_r] belong to them, over all negatives of the whole batch.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip import ops
from fastclip.distributed.exchange import all_rows, gather_rows, to_owners
from fastclip.distributed.ring_sums import ring_sums
from fastclip.distributed.scaled import Scaled, join
from fastclip.distributed.shards import Shards


def similarity_sums(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    column: Tensor,
    shards: Shards,
    normalize: bool,
    backend: str | None,
    mask: ops.Mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_sum, col_sum, row_shift, col_shift, pos (the legend above), differentiable in x, y and scale.

    mask: row_ids, row_limit [n_r] of this rank; col_ids, col_limit [M] of all ranks.
    """
    if shards.mode == "ring":
        sums = ring_sums(x, y, scale, column, shards, normalize, backend, mask)
    else:
        keys = all_rows(y, shards.cols, shards.group)
        sums = ops.similarity_sums(x, keys, scale, column, normalize, backend, mask)
    row_sum, col_sum, row_shift, col_shift, pos = sums
    col_sum, col_shift = _OwnColumns.apply(col_sum, col_shift, shards)
    return row_sum, col_sum, row_shift, col_shift, pos


class _OwnColumns(torch.autograd.Function):
    """This rank's columns [m_r], summed over the ranks, from what each rank has of all columns [M]."""

    @staticmethod
    def forward(ctx, total, shift, shards):
        received = to_owners(torch.stack([total, shift], 1), shards.cols, shards.group)
        own = join(*(Scaled(*part.unbind(1)) for part in received))
        ctx.shards = shards
        ctx.save_for_backward(shift, own.shift)
        ctx.mark_non_differentiable(own.shift)
        return own.total, own.shift

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _shift):
        shift, own_shift = ctx.saved_tensors
        pairs = gather_rows(torch.stack([grad, own_shift], 1), ctx.shards.cols, ctx.shards.group)
        # A shift above the joined one belongs to a column without negatives here: any finite factor serves it.
        return pairs[:, 0] * torch.exp((shift - pairs[:, 1]).clamp_max(0.0)), None, None
