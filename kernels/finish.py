"""The end of backward, one row a program: positives in float32, the scale's gradient, the normalisation's backward.

Reads: the GEMMs' float32 sums [N, D], d [N], the other side's operand rows, x [N, D] with its lengths. Writes: dx
[N, D] in any dtype, inner [N] float32 with dscale = sum of inner. Never holds: more than BD elements of a row.

    g = sums / gain + sum of d y~_p        dx^ = scale g        dx = (dx^ - x^ <x^, dx^>) / |x|        (math.md, eq. 8)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.operands import EPS, Operand
from fastclip.kernels.tiles import SCALE, UNGAIN


@triton.jit
def feature_block(p_x, row, o_d, stride_n, stride_d, length, D):
    """x^ [BD] float32, before any rounding."""
    b_x = tl.load(p_x + row * stride_n + o_d.to(tl.int64) * stride_d, mask=o_d < D, other=0.0).to(tl.float32)
    return tl.div_rn(b_x, tl.broadcast_to(length, b_x.shape))


@triton.jit
def store_gradient(p_out, row, o_d, b_g, b_x, inner, length, scale, D, NORMALIZE: tl.constexpr, EPS: tl.constexpr):
    if NORMALIZE:
        # A length that was clamped is a constant, and its row has no tangent plane.
        along = tl.where(length > EPS, inner, 0.0)
        b_g = tl.div_rn(b_g - b_x * along, tl.broadcast_to(length, b_g.shape))
    tl.store(p_out + row * D + o_d, (b_g * scale).to(p_out.dtype.element_ty), mask=o_d < D)


@triton.jit
def row_block(p_sums, p_other, p_positive, weight, row, o_d, ungain, D, DP):
    """g [BD] of a row with one positive."""
    b_other = tl.load(p_other + tl.load(p_positive + row) * DP + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    return tl.load(p_sums + row * D + o_d, mask=o_d < D, other=0.0) * ungain + weight * b_other


@triton.jit(do_not_specialize=["D"])
def finish_rows_kernel(
    p_sums, p_other, p_positive, p_d, p_x, p_length, p_const, p_out, p_inner, D, stride_n, stride_d,
    DP, BD: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(p_d + row)
    ungain, scale = tl.load(p_const + UNGAIN), tl.load(p_const + SCALE)
    length = tl.load(p_length + row) if NORMALIZE else 1.0
    inner = tl.zeros((BD,), tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        b_g = row_block(p_sums, p_other, p_positive, weight, row, o_d, ungain, D, DP)
        inner += b_g * feature_block(p_x, row, o_d, stride_n, stride_d, length, D)
    inner = tl.sum(inner, 0)
    tl.store(p_inner + row, inner)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        b_g = row_block(p_sums, p_other, p_positive, weight, row, o_d, ungain, D, DP)
        b_x = feature_block(p_x, row, o_d, stride_n, stride_d, length, D)
        store_gradient(p_out, row, o_d, b_g, b_x, inner, length, scale, D, NORMALIZE, EPS)


@triton.jit
def column_block(p_sums, p_other, p_order, p_d, first, last, column, o_d, ungain, D, DP):
    """g [BD] of a column: the rows that name it as their positive are order[first:last]."""
    b_g = tl.load(p_sums + column * D + o_d, mask=o_d < D, other=0.0) * ungain
    for i in range(first, last):
        row = tl.load(p_order + i)
        b_g += tl.load(p_d + row) * tl.load(p_other + row * DP + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    return b_g


@triton.jit(do_not_specialize=["D"])
def finish_columns_kernel(
    p_sums, p_other, p_order, p_first, p_d, p_y, p_length, p_const, p_out, D, stride_m, stride_d,
    DP, BD: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64)
    first, last = tl.load(p_first + column), tl.load(p_first + column + 1)
    ungain, scale = tl.load(p_const + UNGAIN), tl.load(p_const + SCALE)
    length = tl.load(p_length + column) if NORMALIZE else 1.0
    inner = tl.zeros((BD,), tl.float32)
    if NORMALIZE:
        for start in range(0, D, BD):
            o_d = start + tl.arange(0, BD)
            b_g = column_block(p_sums, p_other, p_order, p_d, first, last, column, o_d, ungain, D, DP)
            inner += b_g * feature_block(p_y, column, o_d, stride_m, stride_d, length, D)
    along = tl.sum(inner, 0)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        b_g = column_block(p_sums, p_other, p_order, p_d, first, last, column, o_d, ungain, D, DP)
        b_y = feature_block(p_y, column, o_d, stride_m, stride_d, length, D)
        store_gradient(p_out, column, o_d, b_g, b_y, along, length, scale, D, NORMALIZE, EPS)


def rows(
    sums: Tensor, x: Tensor, x_op: Operand, where: slice, other: Tensor, positive: Tensor, d: Tensor, const: Tensor,
    out: Tensor, inner: Tensor,
) -> None:  # fmt: skip
    """Finish one slab: out [n, D] and inner [n] from sums [n, D]; `where` is the slab's place in x_op."""
    length = sums if x_op.length is None else x_op.length[where]
    finish_rows_kernel[(len(x),)](
        p_sums=sums, p_other=other, p_positive=positive, p_d=d, p_x=x, p_length=length, p_const=const, p_out=out,
        p_inner=inner, D=x.shape[1], stride_n=x.stride(0), stride_d=x.stride(1), DP=other.shape[1],
        **_launch(x.shape[1], x_op),
    )  # fmt: skip


def columns(
    sums: Tensor, y: Tensor, y_op: Operand, other: Tensor, positive: Tensor, d: Tensor, const: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dy [M, D] in `dtype`. Rows are sorted by their positive, so that each column adds its rows in a fixed order."""
    ordered, order = torch.sort(positive, stable=True)
    first = torch.searchsorted(ordered, torch.arange(len(y) + 1, device=y.device))
    out = torch.empty(y.shape, dtype=dtype, device=y.device)
    finish_columns_kernel[(len(y),)](
        p_sums=sums, p_other=other, p_order=order, p_first=first, p_d=d, p_y=y,
        p_length=sums if y_op.length is None else y_op.length, p_const=const, p_out=out,
        D=y.shape[1], stride_m=y.stride(0), stride_d=y.stride(1), DP=other.shape[1], **_launch(y.shape[1], y_op),
    )  # fmt: skip
    return out


def _launch(width: int, operand: Operand) -> dict[str, object]:
    BD = min(1024, max(32, triton.next_power_of_2(width)))
    return {"BD": BD, "NORMALIZE": operand.length is not None, "EPS": EPS, "num_warps": 4 if BD >= 512 else 1}
