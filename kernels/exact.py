"""The exact fallback: every row's own maximum as its shift, found and summed in one pass (math.md, eq. 7).

Reads: rows [N, DP], columns [M, DP], a key per row and per column (equal keys: the positive), the flag. Writes: sum [N]
and shift [N], only where the flag is up. Never holds: more than one tile of S. Called twice, rows and columns swapped.
A program owns BN rows and walks along all columns with a running maximum, so it needs no workspace.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels import configs
from fastclip.kernels.operands import Operand
from fastclip.kernels.tiles import SCALE, dot_tile, exp_minus


@triton.jit
def add_columns(S, top, total, PRECISION: tl.constexpr):
    """Take the columns of S [BN, BM], -inf where an entry does not count, into the running maxima and sums [BN]."""
    new_top = tl.maximum(top, tl.max(S, 1))
    base = finite_or_zero(new_top)
    total = total * exp_minus(top, base, PRECISION) + tl.sum(exp_minus(S, base[:, None], PRECISION), 1)
    return new_top, total


@triton.jit
def finite_or_zero(top):
    """The maximum, 0 for a row without entries."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=["N", "M"])
def exact_sums_kernel(
    p_flag, p_x, p_y, p_row_key, p_col_key, p_const, p_sum, p_shift, N, M,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.load(p_flag) == 0:
        return
    row = tl.program_id(0).to(tl.int64) * BN
    o_n = row + tl.arange(0, BN)
    b_row_key = tl.load(p_row_key + o_n, mask=o_n < N, other=-1)
    scale = tl.load(p_const + SCALE)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, M, BM):
        col = tl.cast(start, tl.int64)
        o_m = col + tl.arange(0, BM)
        S = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION) * scale
        b_col_key = tl.load(p_col_key + o_m, mask=o_m < M, other=-1)
        negative = (b_row_key[:, None] != b_col_key[None, :]) & (o_m < M)[None, :]
        top, total = add_columns(tl.where(negative, S, float("-inf")), top, total, PRECISION)
    tl.store(p_sum + o_n, total, mask=o_n < N)
    tl.store(p_shift + o_n, finite_or_zero(top), mask=o_n < N)


@triton.jit(do_not_specialize=["N", "M"])
def exact_masked_sums_kernel(
    p_flag, p_x, p_y, p_row_key, p_col_key, p_row_code, p_col_code, p_limit, p_const, p_sum, p_shift, N, M,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As above without the entries of equal codes and those above the row's limit (masked.py)."""
    if tl.load(p_flag) == 0:
        return
    row = tl.program_id(0).to(tl.int64) * BN
    o_n = row + tl.arange(0, BN)
    b_row_key = tl.load(p_row_key + o_n, mask=o_n < N, other=-1)
    b_row_code = tl.load(p_row_code + o_n, mask=o_n < N, other=-1)
    b_limit = tl.load(p_limit + o_n, mask=o_n < N, other=0.0)
    scale = tl.load(p_const + SCALE)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, M, BM):
        col = tl.cast(start, tl.int64)
        o_m = col + tl.arange(0, BM)
        S = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION) * scale
        b_col_key = tl.load(p_col_key + o_m, mask=o_m < M, other=-1)
        b_col_code = tl.load(p_col_code + o_m, mask=o_m < M, other=-2)
        out = (b_row_key[:, None] == b_col_key[None, :]) | (b_row_code[:, None] == b_col_code[None, :])
        out = out | (b_limit[:, None] < S) | (o_m >= M)[None, :]
        top, total = add_columns(tl.where(out, float("-inf"), S), top, total, PRECISION)
    tl.store(p_sum + o_n, total, mask=o_n < N)
    tl.store(p_shift + o_n, finite_or_zero(top), mask=o_n < N)


def sums_if(
    flag: Tensor, x: Operand, y: Operand, row_key: Tensor, col_key: Tensor, const: Tensor,
    total: Tensor, shift: Tensor, precision: str,
) -> None:  # fmt: skip
    """Where the flag is up, replace total [N] and shift [N] by the sums over x's rows under their own maxima."""
    grid, launch = _launch(flag, x, y, row_key, col_key, const, precision)
    exact_sums_kernel[grid](p_sum=total, p_shift=shift, **launch)


def masked_sums_if(
    flag: Tensor, x: Operand, y: Operand, row_key: Tensor, col_key: Tensor, row_code: Tensor, col_code: Tensor,
    limit: Tensor, const: Tensor, total: Tensor, shift: Tensor, precision: str,
) -> None:  # fmt: skip
    """The same without what the mask takes out; limit [N] is that of x's side."""
    grid, launch = _launch(flag, x, y, row_key, col_key, const, precision)
    exact_masked_sums_kernel[grid](
        p_row_code=row_code, p_col_code=col_code, p_limit=limit, p_sum=total, p_shift=shift, **launch
    )


def _launch(flag, x, y, row_key, col_key, const, precision) -> tuple[tuple[int], dict[str, object]]:
    N, M = len(x.rows), len(y.rows)
    tiles = configs.choose("exact", x.rows, precision, max(N, M))
    launch = tiles.launch()
    del launch["GROUP"]
    shared = {
        "p_flag": flag, "p_x": x.rows, "p_y": y.rows, "p_row_key": row_key, "p_col_key": col_key, "p_const": const,
        "N": N, "M": M, "DP": x.rows.shape[1], "PRECISION": precision,
    }  # fmt: skip
    return (triton.cdiv(N, tiles.BN),), {**shared, **launch}
