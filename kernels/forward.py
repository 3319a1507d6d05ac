"""Forward: the sums of exp over every row's and column's negatives, from one pass over the tiles of S (math.md, eq. 2).

Reads: x~ [N, DP], y~ [M, DP], positive [N]. Writes: row_sum [N], col_sum [M] under row_shift, col_shift; pos [N].
Never holds: S, nor more than `workspace` bytes of per-tile partial sums. One exp per entry serves its row and column.

Order of the kernels: shift (c of eq. 7), then for each group of rows sums (partials per tile) and combine (adds them in
a fixed order), then settle (checks the range, brings every sum near 1), then exact.py's, which return at once unless
settle raised the flag. Nothing waits for the host.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels import configs, exact
from fastclip.kernels.operands import Operand
from fastclip.kernels.tiles import (
    CONSTANTS,
    SCALE,
    SHIFT,
    dot_tile,
    exp_common,
    inside,
    positive_in_tile,
    store_exponent,
    tile_of,
)

# Shifts are multiples of these, so that c + k * STEP is exact in float32.
UNIT = tl.constexpr(0.0625)
STEP = tl.constexpr(0.6875)
SAFE_EXPONENT = 60.0  # every sum stays below e^60 (math.md, eq. 7)
LARGEST = tl.constexpr(1e38)  # a bound that overflows must not make the shift infinite
TINY_SUM = tl.constexpr(1e-25)  # below this the fixed shift may have lost negatives
BLOCK = 1024


@triton.jit(do_not_specialize=["N", "M"])
def shift_kernel(p_x_norm, p_y_norm, p_scale, p_const, N, M, margin, BLOCK: tl.constexpr):
    """One program: c = max(0, |scale| max|x~| max|y~| + margin), rounded up to a multiple of UNIT."""
    x_norm = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        x_norm = tl.maximum(x_norm, tl.load(p_x_norm + o_n, mask=o_n < N, other=0.0))
    y_norm = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, M, BLOCK):
        o_m = start + tl.arange(0, BLOCK)
        y_norm = tl.maximum(y_norm, tl.load(p_y_norm + o_m, mask=o_m < M, other=0.0))
    scale = tl.load(p_scale).to(tl.float32)
    bound = tl.abs(scale) * tl.max(x_norm, 0) * tl.max(y_norm, 0)
    shift = tl.maximum(tl.ceil((bound + margin) / UNIT) * UNIT, 0.0)
    store_exponent(p_const, scale, tl.minimum(shift, LARGEST))


@triton.jit
def store_positives(p_pos, acc, scale, place, row, BN: tl.constexpr, BM: tl.constexpr):
    """pos of the rows whose positive lies in the tile, at `place` [BN]."""
    if tl.max(place, 0) >= 0:
        hit = place[:, None] == tl.arange(0, BM)[None, :]
        pos = tl.sum(tl.where(hit, acc, 0.0), 1) * scale
        tl.store(p_pos + row + tl.arange(0, BN), pos, mask=place >= 0)


@triton.jit(do_not_specialize=["N", "M"])
def sums_kernel(
    p_x, p_y, p_positive, p_const, p_row_part, p_col_part, p_pos, N, M,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: its row sums into row_part [tiles_m, N], its column sums into col_part [tiles_n, M]."""
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    acc = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION)

    o_n, o_m = row + tl.arange(0, BN), col + tl.arange(0, BM)
    place = positive_in_tile(p_positive, row, col, N, BN, BM)
    store_positives(p_pos, acc, tl.load(p_const + SCALE), place, row, BN, BM)
    e = exp_common(acc, p_const, PRECISION)
    if (tl.max(place, 0) >= 0) | (row + BN > N) | (col + BM > M):
        hit = place[:, None] == tl.arange(0, BM)[None, :]
        e = tl.where(inside(row, col, N, M, BN, BM) & ~hit, e, 0.0)
    tl.store(p_row_part + i_m.to(tl.int64) * N + o_n, tl.sum(e, 1), mask=o_n < N)
    tl.store(p_col_part + i_n.to(tl.int64) * M + o_m, tl.sum(e, 0), mask=o_m < M)


@triton.jit(do_not_specialize=["T", "L", "first"])
def combine_kernel(p_part, p_out, T, L, first, BT: tl.constexpr, BL: tl.constexpr):
    """out [L] = sum of part [T, L] over T, in a fixed order, added to what out holds unless this is the first group."""
    o_l = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    m_l = o_l < L
    acc = tl.zeros((BT, BL), p_part.dtype.element_ty)
    for start in range(0, T, BT):
        o_t = start + tl.arange(0, BT)
        p_b = p_part + o_t.to(tl.int64)[:, None] * L + o_l[None, :]
        acc += tl.load(p_b, mask=(o_t < T)[:, None] & m_l[None, :], other=0.0)
    before = tl.load(p_out + o_l, mask=m_l & (first == 0), other=0.0)
    tl.store(p_out + o_l, before + tl.sum(acc, 0), mask=m_l)


@triton.jit(do_not_specialize=["L", "negatives"])
def settle_kernel(p_sum, p_shift, p_const, p_flag, L, negatives, BLOCK: tl.constexpr):
    """Raise the flag for a sum out of range, else move it to within e^(+-STEP / 2) of 1, and its shift with it.

    So 1 / sum, which autograd forms, is never far from 1, and exp(S - shift) <= 1.5 for every negative of the row: the
    gradient's weights bound G, whatever the features are (backward.py).
    """
    o_l = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_l = o_l < L
    total = tl.load(p_sum + o_l, mask=m_l, other=1.0)
    sound = (total >= TINY_SUM) & (total < float("inf"))
    lost = tl.max((~sound & (negatives > 0)).to(tl.int32), 0)
    if lost > 0:
        tl.store(p_flag, 1)
    steps = tl.floor(tl.log(tl.where(sound, total, 1.0)) / STEP + 0.5) * STEP
    # float64: exp's own rounding of its argument would put 1e-6 into every sum alike.
    factor = tl.exp(-steps.to(tl.float64))
    tl.store(p_sum + o_l, (total.to(tl.float64) * factor).to(tl.float32), mask=m_l)
    tl.store(p_shift + o_l, tl.load(p_const + SHIFT) + steps, mask=m_l)


def similarity_sums(
    x: Operand, y: Operand, scale: Tensor, positive: Tensor, precision: str, workspace: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_sum, col_sum, row_shift, col_shift, pos (contract: fastclip/ops.py), float32."""
    N, M, DP = len(x.rows), len(y.rows), x.rows.shape[1]
    tiles = configs.choose("sums", x.rows, precision, max(N, M))

    def vector(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.float32, device=x.rows.device)

    const = fixed_shift(x, y, scale)
    row_sum, row_shift, pos = vector(N), vector(N), vector(N)
    col_sum, col_shift = vector(M), vector(M)
    group = min(N, configs.partial_rows(tiles, M, workspace))
    row_part = vector(triton.cdiv(M, tiles.BM) * group)
    col_part = vector(triton.cdiv(group, tiles.BN) * M)
    for start in range(0, N, group):
        rows = slice(start, min(start + group, N))
        n = rows.stop - start
        tiles_n, tiles_m = triton.cdiv(n, tiles.BN), triton.cdiv(M, tiles.BM)
        sums_kernel[(tiles_n * tiles_m,)](
            p_x=x.rows[rows], p_y=y.rows, p_positive=positive[rows], p_const=const,
            p_row_part=row_part, p_col_part=col_part, p_pos=pos[rows], N=n, M=M, DP=DP,
            PRECISION=precision, **tiles.launch(),
        )  # fmt: skip
        combine(row_part, row_sum[rows], tiles_m, first=True)
        combine(col_part, col_sum, tiles_n, first=start == 0)
    flag = torch.zeros(1, dtype=torch.int32, device=x.rows.device)
    settle(row_sum, row_shift, const, flag, negatives=M > 1)
    settle(col_sum, col_shift, const, flag, negatives=M > 1)
    column = torch.arange(M, device=x.rows.device)
    exact.sums_if(flag, x, y, positive, column, const, row_sum, row_shift, precision)
    exact.sums_if(flag, y, x, column, positive, const, col_sum, col_shift, precision)
    return row_sum, col_sum, row_shift, col_shift, pos


def fixed_shift(x: Operand, y: Operand, scale: Tensor) -> Tensor:
    """The constants of a forward pass."""
    N, M = len(x.norm), len(y.norm)
    const = torch.empty(CONSTANTS, dtype=torch.float32, device=x.norm.device)
    margin = math.log(max(N, M)) - SAFE_EXPONENT
    shift_kernel[(1,)](
        p_x_norm=x.norm, p_y_norm=y.norm, p_scale=scale, p_const=const, N=N, M=M, margin=margin, BLOCK=8 * BLOCK,
        num_warps=8,
    )  # fmt: skip
    return const


def combine(part: Tensor, out: Tensor, parts: int, *, first: bool) -> None:
    """out (+)= the sum of part's first `parts` rows of len(out)."""
    BL = 64
    combine_kernel[(triton.cdiv(len(out), BL),)](
        p_part=part, p_out=out, T=parts, L=len(out), first=int(first), BT=32, BL=BL, num_warps=4
    )


def settle(total: Tensor, shift: Tensor, const: Tensor, flag: Tensor, *, negatives: bool) -> None:
    """Check and rescale the sums in place; write their shifts; raise the flag where a sum is out of range."""
    settle_kernel[(triton.cdiv(len(total), BLOCK),)](
        p_sum=total, p_shift=shift, p_const=const, p_flag=flag, L=len(total), negatives=int(negatives), BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
