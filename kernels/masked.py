"""The softmax sums and G where a mask takes pairs out of the negatives (math.md, eq. 10).

    out of row i:     row_id_i == col_id_j or S_ij > row_limit_i            out of column j: the same with col_limit_j

Reads: x~, y~, positive [N], codes [N], [M] int32 (equal where the ids are), limits [N], [M] float32. Writes: what
forward.py and gradient.py write. Never holds: the mask as a matrix; it is compared inside the tile. Every row and
column has its own shift in G, so that one kernel serves whatever the forward pass chose.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels import configs, exact
from fastclip.kernels.forward import combine, fixed_shift, settle, store_positives
from fastclip.kernels.gradient import gain_constants, store_tile
from fastclip.kernels.operands import Operand
from fastclip.kernels.tiles import (
    SCALE,
    UNGAIN,
    dot_tile,
    exp_common,
    exp_minus,
    inside,
    positive_in_tile,
    tile_of,
)


@dataclass(frozen=True)
class Mask:
    """row_code [N], col_code [M] int32; row_limit [N], col_limit [M] float32 (no limit: infinity)."""

    row_code: Tensor
    col_code: Tensor
    row_limit: Tensor
    col_limit: Tensor

    def block(self, rows: slice, cols: slice) -> dict[str, Tensor]:
        """Keyword arguments of a launch over a block of S."""
        return {
            "p_row_code": self.row_code[rows],
            "p_col_code": self.col_code[cols],
            "p_row_limit": self.row_limit[rows],
            "p_col_limit": self.col_limit[cols],
        }


def codes(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """int32 codes, equal where the int64 ids are, without a host synchronisation: half the work in the tile."""
    ordered, order = torch.sort(torch.cat([row_ids, col_ids]), stable=True)
    new = torch.ones_like(ordered, dtype=torch.int32)
    new[1:] = ordered[1:] != ordered[:-1]
    code = torch.empty_like(new).scatter_(0, order, torch.cumsum(new, 0, dtype=torch.int32))
    return code[: len(row_ids)], code[len(row_ids) :]


@triton.jit
def matches_in_tile(p_row_code, p_col_code, row, col, N, M, BN: tl.constexpr, BM: tl.constexpr):
    """bool [BN, BM]: the entries whose row and column carry the same id."""
    o_n, o_m = row + tl.arange(0, BN), col + tl.arange(0, BM)
    b_row = tl.load(p_row_code + o_n, mask=o_n < N, other=-1)
    b_col = tl.load(p_col_code + o_m, mask=o_m < M, other=-2)
    return b_row[:, None] == b_col[None, :]


@triton.jit
def above_limits(S, p_row_limit, p_col_limit, row, col, N, M, BN: tl.constexpr, BM: tl.constexpr):
    """bool [BN, BM] twice: the entries above their row's limit, and above their column's."""
    o_n, o_m = row + tl.arange(0, BN), col + tl.arange(0, BM)
    row_limit = tl.load(p_row_limit + o_n, mask=o_n < N, other=0.0)
    col_limit = tl.load(p_col_limit + o_m, mask=o_m < M, other=0.0)
    return row_limit[:, None] < S, col_limit[None, :] < S


@triton.jit(do_not_specialize=["N", "M"])
def masked_sums_kernel(
    p_x, p_y, p_positive, p_row_code, p_col_code, p_row_limit, p_col_limit, p_const, p_row_part, p_col_part, p_pos,
    N, M, DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: its row sums into row_part [tiles_m, N], its column sums into col_part [tiles_n, M]."""
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    acc = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION)
    scale = tl.load(p_const + SCALE)
    place = positive_in_tile(p_positive, row, col, N, BN, BM)
    store_positives(p_pos, acc, scale, place, row, BN, BM)
    hit = place[:, None] == tl.arange(0, BM)[None, :]
    match = matches_in_tile(p_row_code, p_col_code, row, col, N, M, BN, BM)
    counted = inside(row, col, N, M, BN, BM) & ~(hit | match)
    high_row, high_col = above_limits(acc * scale, p_row_limit, p_col_limit, row, col, N, M, BN, BM)
    e = tl.where(counted, exp_common(acc, p_const, PRECISION), 0.0)
    o_n, o_m = row + tl.arange(0, BN), col + tl.arange(0, BM)
    tl.store(p_row_part + i_m.to(tl.int64) * N + o_n, tl.sum(tl.where(high_row, 0.0, e), 1), mask=o_n < N)
    tl.store(p_col_part + i_n.to(tl.int64) * M + o_m, tl.sum(tl.where(high_col, 0.0, e), 0), mask=o_m < M)


@triton.jit(do_not_specialize=["N", "M", "first_col"])
def masked_gradient_kernel(
    p_x, p_y, p_positive, p_row_code, p_col_code, p_row_limit, p_col_limit, p_const, p_a, p_b, p_row_shift,
    p_col_shift, p_g, N, M, first_col, ld,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of gain * G. The block's columns start at first_col of S."""
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    S = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION) * tl.load(p_const + SCALE)
    gain = 1.0 / tl.load(p_const + UNGAIN)
    high_row, high_col = above_limits(S, p_row_limit, p_col_limit, row, col, N, M, BN, BM)
    o_n, o_m = row + tl.arange(0, BN), col + tl.arange(0, BM)
    row_shift = tl.load(p_row_shift + o_n, mask=o_n < N, other=0.0)
    a = tl.load(p_a + o_n, mask=o_n < N, other=0.0) * gain
    g = tl.where(high_row, 0.0, exp_minus(S, row_shift[:, None], PRECISION) * a[:, None])
    col_shift = tl.load(p_col_shift + o_m, mask=o_m < M, other=0.0)
    b = tl.load(p_b + o_m, mask=o_m < M, other=0.0) * gain
    g += tl.where(high_col, 0.0, exp_minus(S, col_shift[None, :], PRECISION) * b[None, :])
    match = matches_in_tile(p_row_code, p_col_code, row, col, N, M, BN, BM)
    store_tile(p_g, tl.where(match, 0.0, g), p_positive, row, col, first_col, N, M, ld, BN, BM)


def masked_sums(
    x: Operand, y: Operand, scale: Tensor, positive: Tensor, mask: Mask, precision: str, workspace: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_sum, col_sum, row_shift, col_shift, pos (contract: fastclip/ops.py), float32."""
    N, M = len(x.rows), len(y.rows)
    tiles = configs.choose("masked", x.rows, precision, max(N, M))
    const = fixed_shift(x, y, scale)
    row_sum, row_shift, pos = (torch.empty_like(x.norm) for _ in range(3))
    col_sum, col_shift = torch.empty_like(y.norm), torch.empty_like(y.norm)
    group = min(N, configs.partial_rows(tiles, M, workspace))
    row_part = x.norm.new_empty(triton.cdiv(M, tiles.BM) * group)
    col_part = x.norm.new_empty(triton.cdiv(group, tiles.BN) * M)
    for start in range(0, N, group):
        rows = slice(start, min(start + group, N))
        n = rows.stop - start
        masked_sums_kernel[(tiles.count(n, M),)](
            p_x=x.rows[rows], p_y=y.rows, p_positive=positive[rows], p_const=const, p_row_part=row_part,
            p_col_part=col_part, p_pos=pos[rows], N=n, M=M, DP=x.rows.shape[1], PRECISION=precision,
            **mask.block(rows, slice(0, M)), **tiles.launch(),
        )  # fmt: skip
        combine(row_part, row_sum[rows], triton.cdiv(M, tiles.BM), first=True)
        combine(col_part, col_sum, triton.cdiv(n, tiles.BN), first=start == 0)
    # A sum may be empty because all its pairs are masked: it raises the flag, and the exact pass confirms it.
    flag = torch.zeros(1, dtype=torch.int32, device=x.rows.device)
    settle(row_sum, row_shift, const, flag, negatives=True)
    settle(col_sum, col_shift, const, flag, negatives=True)
    column = torch.arange(M, device=x.rows.device)
    for a, b, row_key, col_key, row_code, col_code, limit, total, shift in (
        (x, y, positive, column, mask.row_code, mask.col_code, mask.row_limit, row_sum, row_shift),
        (y, x, column, positive, mask.col_code, mask.row_code, mask.col_limit, col_sum, col_shift),
    ):
        exact.masked_sums_if(
            flag, a, b, row_key, col_key, row_code, col_code, limit, const, total, shift, precision
        )  # fmt: skip
    return row_sum, col_sum, row_shift, col_shift, pos


class MaskedGradient:
    """gradient.Gradient with a mask."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, positive: Tensor, row_shift: Tensor, col_shift: Tensor,
                 a: Tensor, b: Tensor, mask: Mask, precision: str):  # fmt: skip
        """x [N, DP], y [M, DP] operands. No negative may exceed its row's or column's shift by more than 0.4."""
        self.x, self.y, self.positive, self.mask, self.precision = x, y, positive, mask, precision
        self.row_shift, self.col_shift, self.a, self.b = row_shift, col_shift, a, b
        self.tiles = configs.choose("masked", x, precision, max(len(x), len(y)))
        self.const = gain_constants(scale, 1.5 * (a.abs().amax() + b.abs().amax()))

    def fill(self, g: Tensor, rows: slice, cols: slice) -> None:
        """g[:n, :m] = gain * G[rows, cols]; the rest of g is left as it is."""
        n, m = rows.stop - rows.start, cols.stop - cols.start
        masked_gradient_kernel[(self.tiles.count(n, m),)](
            p_x=self.x[rows], p_y=self.y[cols], p_positive=self.positive[rows], p_const=self.const, p_a=self.a[rows],
            p_b=self.b[cols], p_row_shift=self.row_shift[rows], p_col_shift=self.col_shift[cols], p_g=g, N=n, M=m,
            first_col=cols.start, ld=g.stride(0), DP=self.x.shape[1], PRECISION=self.precision,
            **self.mask.block(rows, cols), **self.tiles.launch(),
        )  # fmt: skip
