"""G, the derivative of the loss by S off the positives, block by block (math.md, eq. 6).

    G_ij = exp(S_ij - shift) (a_i + b_j)                          where all shifts lie close together: one exp an entry
    G_ij = a_i exp(S_ij - row_shift_i) + b_j exp(S_ij - col_shift_j)                         otherwise: two

Reads: x~, y~, positive, the shifts, the upstream gradients a [N] and b [M]. Writes: blocks of gain * G in the features'
dtype, 0 on the positives. Never holds: more than a tile of S.

`gain` is a power of two that puts the largest possible entry near 2^14: forward.py's settle makes exp(S - shift)
<= 1.5, so that the largest |a| + |b| bounds G. It neither overflows float16 nor sinks into its subnormals, whatever the
upstream gradient is; finish.py multiplies by 1 / gain in float32. Which of the two forms runs is decided on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels import configs
from fastclip.kernels.tiles import (
    CONSTANTS,
    ONE_SHIFT,
    SCALE,
    UNGAIN,
    dot_tile,
    exp_common,
    exp_minus,
    positive_in_tile,
    store_exponent,
    tile_of,
)

# Shifts that lie within SPREAD of each other let one exp under a common shift serve: it stays below e^60, and the
# factor exp(common - shift) below e^50.
SPREAD = tl.constexpr(110.0)
SAFE_EXPONENT = tl.constexpr(60.0)
LARGEST_LOG2 = tl.constexpr(14.0)
BLOCK = 8192


@triton.jit
def widest(p_weight, p_shift, length, BLOCK: tl.constexpr):
    """max |weight|, max shift, min shift of one side."""
    weight = tl.zeros((BLOCK,), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, length, BLOCK):
        o_l = start + tl.arange(0, BLOCK)
        m_l = o_l < length
        weight = tl.maximum(weight, tl.abs(tl.load(p_weight + o_l, mask=m_l, other=0.0)))
        high = tl.maximum(high, tl.load(p_shift + o_l, mask=m_l, other=float("-inf")))
        low = tl.minimum(low, tl.load(p_shift + o_l, mask=m_l, other=float("inf")))
    return tl.max(weight, 0), tl.max(high, 0), tl.min(low, 0)


@triton.jit
def store_weights(p_weight, p_shift, p_out, length, common, gain, one_shift, BLOCK: tl.constexpr):
    """out = weight * gain, times exp(common - shift) where one exp serves all."""
    for start in range(0, length, BLOCK):
        o_l = start + tl.arange(0, BLOCK)
        m_l = o_l < length
        weight = tl.load(p_weight + o_l, mask=m_l, other=0.0) * gain
        shift = tl.load(p_shift + o_l, mask=m_l, other=0.0)
        power = tl.where(one_shift, common.to(tl.float64) - shift.to(tl.float64), 0.0)
        tl.store(p_out + o_l, (weight.to(tl.float64) * tl.exp(power)).to(tl.float32), mask=m_l)


@triton.jit
def store_gain(p_const, bound):
    """Write UNGAIN for entries of G up to `bound`; returns the gain."""
    usable = (bound > 0) & (bound < float("inf"))
    power = tl.floor(LARGEST_LOG2 - tl.log2(tl.where(usable, bound, 1.0)))
    power = tl.where(usable, tl.minimum(tl.maximum(power, -100.0), 100.0), 0.0)
    tl.store(p_const + UNGAIN, tl.exp2(-power))
    return tl.exp2(power)


@triton.jit
def gain_kernel(p_scale, p_bound, p_const):
    """The constants of a pass whose G has no shift and no entry above bound."""
    scale = tl.load(p_scale).to(tl.float32)
    store_exponent(p_const, scale, tl.zeros_like(scale))
    store_gain(p_const, tl.load(p_bound))


@triton.jit(do_not_specialize=["N", "M"])
def weights_kernel(
    p_a, p_b, p_row_shift, p_col_shift, p_scale, p_const, p_row_weight, p_col_weight, N, M, BLOCK: tl.constexpr
):
    """One program: the constants of the backward pass, and a and b as the tiles of G use them."""
    a, row_high, row_low = widest(p_a, p_row_shift, N, BLOCK)
    b, col_high, col_low = widest(p_b, p_col_shift, M, BLOCK)
    high = tl.maximum(row_high, col_high)
    one_shift = high - tl.minimum(row_low, col_low) <= SPREAD
    common = high - SAFE_EXPONENT
    store_exponent(p_const, tl.load(p_scale).to(tl.float32), common)
    tl.store(p_const + ONE_SHIFT, one_shift.to(tl.float32))
    gain = store_gain(p_const, 1.5 * (a + b))
    store_weights(p_a, p_row_shift, p_row_weight, N, common, gain, one_shift, BLOCK)
    store_weights(p_b, p_col_shift, p_col_weight, M, common, gain, one_shift, BLOCK)


@triton.jit
def store_tile(p_g, g, p_positive, row, col, first_col, N, M, ld, BN: tl.constexpr, BM: tl.constexpr):
    """g [BN, BM] into the block p_g, with 0 on the positives. The block's columns start at first_col of S.

    No mask: a block has room for whole tiles (configs.wave), and nobody reads what lies past the last row or column.
    """
    place = positive_in_tile(p_positive, row, col + first_col, N, BN, BM)
    if tl.max(place, 0) >= 0:
        g = tl.where(place[:, None] == tl.arange(0, BM)[None, :], 0.0, g)
    offsets = tl.arange(0, BN)[:, None] * ld + tl.arange(0, BM)[None, :]
    tl.store(p_g + (row * ld + col) + offsets, g.to(p_g.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "M", "first_col"])
def gradient_kernel(
    p_x, p_y, p_positive, p_const, p_row_weight, p_col_weight, p_g, N, M, first_col, ld,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile under the common shift. Returns at once where there is none."""
    if tl.load(p_const + ONE_SHIFT) == 0:
        return
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    acc = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION)
    o_n, o_m = row + tl.arange(0, BN), col + tl.arange(0, BM)
    row_weight = tl.load(p_row_weight + o_n, mask=o_n < N, other=0.0)
    col_weight = tl.load(p_col_weight + o_m, mask=o_m < M, other=0.0)
    g = exp_common(acc, p_const, PRECISION) * (row_weight[:, None] + col_weight[None, :])
    store_tile(p_g, g, p_positive, row, col, first_col, N, M, ld, BN, BM)


@triton.jit(do_not_specialize=["N", "M", "first_col"])
def gradient_own_shifts_kernel(
    p_x, p_y, p_positive, p_const, p_row_weight, p_col_weight, p_row_shift, p_col_shift, p_g, N, M, first_col, ld,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every tile, by a few programs that share them, where shifts differ too much for one exp. Else returns at once."""
    if tl.load(p_const + ONE_SHIFT) != 0:
        return
    scale = tl.load(p_const + SCALE)
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    for i_t in range(tl.program_id(0), tiles_n * tiles_m, tl.num_programs(0)):
        i_n, i_m = tile_of(i_t, tiles_n, tiles_m, GROUP)
        row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
        S = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION) * scale
        o_n, o_m = row + tl.arange(0, BN), col + tl.arange(0, BM)
        row_shift = tl.load(p_row_shift + o_n, mask=o_n < N, other=0.0)
        g = exp_minus(S, row_shift[:, None], PRECISION)
        g *= tl.load(p_row_weight + o_n, mask=o_n < N, other=0.0)[:, None]
        col_shift = tl.load(p_col_shift + o_m, mask=o_m < M, other=0.0)
        by_col = exp_minus(S, col_shift[None, :], PRECISION)
        g += by_col * tl.load(p_col_weight + o_m, mask=o_m < M, other=0.0)[None, :]
        store_tile(p_g, g, p_positive, row, col, first_col, N, M, ld, BN, BM)


def gain_constants(scale: Tensor, bound: Tensor) -> Tensor:
    """The constants of a pass whose G has no shift and no entry above bound, 0-d float32."""
    const = torch.empty(CONSTANTS, dtype=torch.float32, device=bound.device)
    gain_kernel[(1,)](p_scale=scale, p_bound=bound, p_const=const, num_warps=1)
    return const


class Gradient:
    """Fills blocks of G for one backward pass; `const` carries the scale and 1 / gain to finish.py."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, positive: Tensor, row_shift: Tensor, col_shift: Tensor,
                 a: Tensor, b: Tensor, precision: str):  # fmt: skip
        """x [N, DP], y [M, DP] operands. No negative may exceed its row's or column's shift by more than 0.4."""
        self.x, self.y, self.positive, self.precision = x, y, positive, precision
        self.row_shift, self.col_shift = row_shift, col_shift
        self.const = torch.empty(CONSTANTS, dtype=torch.float32, device=x.device)
        self.row_weight, self.col_weight = torch.empty_like(a), torch.empty_like(b)
        self.tiles = configs.choose("gradient", x, precision, max(len(x), len(y)))
        self.tiles_own = configs.choose("gradient_own", x, precision, max(len(x), len(y)))
        weights_kernel[(1,)](
            p_a=a, p_b=b, p_row_shift=row_shift, p_col_shift=col_shift, p_scale=scale, p_const=self.const,
            p_row_weight=self.row_weight, p_col_weight=self.col_weight, N=len(a), M=len(b), BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip

    def fill(self, g: Tensor, rows: slice, cols: slice) -> None:
        """g[:n, :m] = gain * G[rows, cols]; the rest of g is left as it is."""
        n, m = rows.stop - rows.start, cols.stop - cols.start
        shared = {
            "p_x": self.x[rows], "p_y": self.y[cols], "p_positive": self.positive[rows], "p_const": self.const,
            "p_row_weight": self.row_weight[rows], "p_col_weight": self.col_weight[cols], "p_g": g,
            "N": n, "M": m, "first_col": cols.start, "ld": g.stride(0), "DP": self.x.shape[1],
            "PRECISION": self.precision,
        }  # fmt: skip
        gradient_kernel[(self.tiles.count(n, m),)](**shared, **self.tiles.launch())
        programs = min(self.tiles_own.count(n, m), configs.processors(g.device))
        gradient_own_shifts_kernel[(programs,)](
            p_row_shift=self.row_shift[rows], p_col_shift=self.col_shift[cols], **shared, **self.tiles_own.launch()
        )
