"""ops.similarity_sums round the ring (ring.py), forward and backward.

Legend: x [n_r, D], y [m_r, D] this rank's; y_b [m_b, D] a block's keys; sums as in sums.py.

A row's positive lies in one of the blocks, and the operator wants one in each. So in all others the row names a column
that stands in for it; the operator leaves that pair out of the sums and returns its score, and here it is added again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip import ops
from fastclip.backends.shift import rounded_up
from fastclip.distributed.ring import Block, Gradients, blocks
from fastclip.distributed.scaled import Scaled, join, lift
from fastclip.distributed.shards import Shards
from fastclip.ops import Mask


def ring_sums(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    column: Tensor,
    shards: Shards,
    normalize: bool,
    backend: str | None,
    mask: Mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_sum [n_r], col_sum [M], row_shift, col_shift, pos: this rank's rows against all columns."""
    return _RingSums.apply(x, y, scale, column, shards, normalize, backend, *mask)


class _RingSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, column, shards, normalize, backend, *mask):
        rows, cols, scores = [], scale.new_empty(2, sum(shards.cols)), []
        pos = scale.new_empty(len(x))
        for block in blocks(y, shards):
            at, here = place(column, block)
            row, col, score = _block_sums(x, block, scale, at, here, normalize, backend, _at(mask, block.cols))
            cols[0, block.cols], cols[1, block.cols] = col
            rows.append(row)
            scores.append(score)
            pos = torch.where(here, score, pos)
        row, col = join(*rows), Scaled(*cols.unbind(0))
        ctx.options = shards, normalize, backend or ""
        ctx.save_for_backward(x, y, scale, column, row.shift, col.shift, *mask, *scores)
        ctx.mark_non_differentiable(row.shift, col.shift)
        return row.total, col.total, row.shift, col.shift, pos

    @staticmethod
    @once_differentiable
    def backward(ctx, a, b, _row_shift, _col_shift, d):
        x, y, scale, column, row_shift, col_shift, m0, m1, m2, m3, *scores = ctx.saved_tensors
        shards, normalize, backend = ctx.options
        needs = list(ctx.needs_input_grad[:3])
        row, col = lift(Scaled(a, row_shift), Scaled(b, col_shift))
        dx, dscale, dy = None, torch.zeros_like(scale), Gradients(shards)
        for block, score in zip(blocks(y, shards), scores, strict=True):
            of_block, mask = Scaled(*(part[block.cols] for part in col)), _at((m0, m1, m2, m3), block.cols)
            at, here = place(column, block)
            weight = torch.where(here, d, stand_in_weights(score, at, row, of_block, mask))
            weights = (row.total, of_block.total, weight)
            grad_x, grad_y, grad_scale = torch.ops.fastclip.similarity_sums_backward(
                x, block.y, scale, at, row.shift, of_block.shift, *weights, normalize, needs, backend, *mask
            )
            if needs[0]:
                dx = grad_x if dx is None else dx.to(scale.dtype).add_(grad_x)
            if needs[1]:
                dy.add(grad_y)
            if needs[2]:
                dscale += grad_scale
        return (
            dx.to(x.dtype) if needs[0] else None,
            dy.home() if needs[1] else None,
            dscale if needs[2] else None,
            *(None,) * 8,
        )


def place(column: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """([n_r], [n_r]): where in the block each row's positive is, or what stands in for it; whether it is there."""
    at, m = column - block.cols.start, len(block.y)
    here = (at >= 0) & (at < m)
    return torch.where(here, at, torch.arange(len(column), device=column.device) % m), here


def _block_sums(
    x, block: Block, scale, at: Tensor, here: Tensor, normalize: bool, backend, mask: Mask
) -> tuple[Scaled, Scaled, Tensor]:
    """Of one block: the rows' sums [n_r], the columns' [m_b], the score of each row's positive or stand-in [n_r]."""
    sums = ops.similarity_sums(x, block.y, scale, at, normalize, backend, mask)
    row_sum, col_sum, row_shift, col_shift, score = sums
    # Nothing at all is added for a positive, under a shift that no other one gives way to.
    shift = rounded_up(score).masked_fill(here, -torch.inf)
    term = torch.exp(score - shift)
    out_of_row, out_of_col = _left_out(score, at, mask)
    row = join(Scaled(row_sum, row_shift), Scaled(term.masked_fill(here | out_of_row, 0.0), shift))
    added = Scaled(term.masked_fill(here | out_of_col, 0.0), shift)
    return row, _add_in_turns(Scaled(col_sum, col_shift), added), score


def _add_in_turns(col: Scaled, terms: Scaled) -> Scaled:
    """col [m_b] with one term [n_r] per row, whose stand-ins' columns are 0, 1, ..., m_b - 1, 0, 1, ..."""
    m = len(col.total)
    for first in range(0, len(terms.total), m):
        turn = Scaled(*(part[first : first + m] for part in terms))
        n = len(turn.total)
        joined = join(Scaled(*(part[:n] for part in col)), turn)
        col = Scaled(*(torch.cat([new, old[n:]]) for new, old in zip(joined, col, strict=True)))
    return col


def stand_in_weights(score: Tensor, column: Tensor, row: Scaled, col: Scaled, mask: Mask) -> Tensor:
    """dL/dS [n_r] of the stand-ins: eq. 6 as off the positives; row and col hold a and b and their shifts."""
    out_of_row, out_of_col = _left_out(score, column, mask)
    by_row = row.total * torch.exp(score - row.shift)
    by_col = col.total[column] * torch.exp(score - col.shift[column])
    return by_row.masked_fill(out_of_row, 0.0) + by_col.masked_fill(out_of_col, 0.0)


def _left_out(score: Tensor, column: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Which of the pairs (i, column_i) the mask takes out of the rows' sums, and out of the columns' (eq. 10)."""
    if mask.row_ids is None:
        nothing = torch.zeros_like(score, dtype=torch.bool)
        return nothing, nothing
    match = mask.row_ids == mask.col_ids[column]
    return match | (score > mask.row_limit), match | (score > mask.col_limit[column])


def _at(mask: tuple, cols: slice) -> Mask:
    """The mask of one block."""
    row_ids, col_ids, row_limit, col_limit = mask
    return Mask() if row_ids is None else Mask(row_ids, col_ids[cols], row_limit, col_limit[cols])
