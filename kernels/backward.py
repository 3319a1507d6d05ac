"""Backward: waves of G, each followed by two plain GEMMs (math.md, eq. 6).

    dx^ = scale (G y~ + d y~_p)        dy^ = scale (G^T x~ + scatter of d x~)        dscale = sum <x^, G y~ + d y~_p>

Reads: x~, y~, positive and whatever fills blocks of G. Writes: dx [N, D], dy [M, D], dscale. Never holds: more of G
than `workspace` bytes. The positives' d never enters G's low-precision tiles (finish.py).
"""

from typing import Protocol

import torch
from torch import Tensor

from fastclip.kernels import configs, finish
from fastclip.kernels.gradient import Gradient
from fastclip.kernels.masked import Mask, MaskedGradient
from fastclip.kernels.operands import Operand
from fastclip.kernels.tiles import UNGAIN


class Filler(Protocol):
    """What writes blocks of gain * G."""

    const: Tensor

    def fill(self, g: Tensor, rows: slice, cols: slice) -> None: ...


def similarity_sums_backward(
    x: Tensor, y: Tensor, x_op: Operand, y_op: Operand, scale: Tensor, positive: Tensor,
    row_shift: Tensor, col_shift: Tensor, a: Tensor, b: Tensor, d: Tensor, mask: Mask | None, needs: list[bool],
    precision: str, workspace: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dy in the features' dtype and dscale 0-d float64 (contract: fastclip/ops.py); None where not needed."""
    if not any(needs):
        return None, None, None
    args = (x_op.rows, y_op.rows, scale, positive, row_shift, col_shift, a, b)
    gradient = Gradient(*args, precision) if mask is None else MaskedGradient(*args, mask, precision)
    return waves(gradient, x, y, x_op, y_op, positive, d, needs, workspace, x.dtype)


def waves(
    gradient: Filler, x: Tensor, y: Tensor, x_op: Operand, y_op: Operand, positive: Tensor, d: Tensor,
    needs: list[bool], workspace: int, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dy in `dtype` and dscale from blocks of G: two GEMMs take each in, finish.py ends each slab of rows."""
    (N, D), M = x.shape, len(y)
    need_rows, need_columns = needs[0] or needs[2], needs[1]
    step_n, step_m = configs.wave(N, M, x_op.rows.shape[1], x.element_size(), workspace)
    g = x.new_empty(step_n, step_m)
    if need_rows:
        slab = torch.empty(step_n, D, dtype=torch.float32, device=x.device)
        dx = torch.empty(N, D, dtype=dtype, device=x.device)
        inner = torch.empty(N, dtype=torch.float32, device=x.device)
    if need_columns:
        total = torch.empty(M, D, dtype=torch.float32, device=x.device)
    for row in range(0, N, step_n):
        rows = slice(row, min(row + step_n, N))
        n = rows.stop - row
        for col in range(0, M, step_m):
            cols = slice(col, min(col + step_m, M))
            gradient.fill(g, rows, cols)
            block = g[:n, : cols.stop - col]
            if need_rows:
                gemm(block, y_op.rows[cols, :D], slab[:n], add=col > 0)
            if need_columns:
                gemm(block.T, x_op.rows[rows, :D], total[cols], add=row > 0)
        if need_rows:
            finish.rows(
                slab[:n], x[rows], x_op, rows, y_op.rows, positive[rows], d[rows], gradient.const, dx[rows], inner[rows]
            )
    return (
        dx if needs[0] else None,
        finish.columns(total, y, y_op, x_op.rows, positive, d, gradient.const, dtype) if need_columns else None,
        inner.sum(dtype=torch.float64) if needs[2] else None,
    )


def similarity_products(
    x_op: Operand, y_op: Operand, scale: Tensor, positive: Tensor, row_shift: Tensor, col_shift: Tensor,
    a: Tensor, b: Tensor, d: Tensor, x_values: Tensor, y_values: Tensor, precision: str, workspace: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """G y_values [N, V] and G^T x_values [M, V], float32 (contract: fastclip/ops.py); G in float32 blocks."""
    N, M = len(x_op.rows), len(y_op.rows)
    gradient = Gradient(x_op.rows, y_op.rows, scale, positive, row_shift, col_shift, a, b, precision)
    step_n, step_m = configs.wave(N, M, x_op.rows.shape[1], 4, workspace)
    g = x_values.new_empty(step_n, step_m)
    by_row, by_col = torch.empty_like(x_values), torch.empty_like(y_values)
    for row in range(0, N, step_n):
        rows = slice(row, min(row + step_n, N))
        for col in range(0, M, step_m):
            cols = slice(col, min(col + step_m, M))
            gradient.fill(g, rows, cols)
            block = g[: rows.stop - row, : cols.stop - col]
            gemm(block, y_values[cols], by_row[rows], add=col > 0)
            gemm(block.T, x_values[rows], by_col[cols], add=row > 0)
    ungain = gradient.const[UNGAIN.value]
    by_row = by_row * ungain + d[:, None] * y_values[positive]
    # index_put_, unlike index_add_, adds in a fixed order on every device.
    return by_row, (by_col * ungain).index_put_((positive,), d[:, None] * x_values, accumulate=True)


def gemm(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out float32 (+)= a @ b, accumulated in float32: cuBLAS; on a CPU through float32 copies."""
    if not a.is_cuda:
        a, b = a.float(), b.float()
    mixed = {"out_dtype": torch.float32} if a.dtype != torch.float32 else {}
    if add:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)
