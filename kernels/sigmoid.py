"""SigLIP's pairwise sigmoid loss, without the matrix (math.md, eq. 11).

    row_loss_i = sum_j softplus(-z_ij t_ij)     t = S + bias     z = +1 on positives, -1 elsewhere
    G_ij = -weight_i z_ij sigmoid(-z_ij t_ij)

Reads: x~, y~, positive [N], scale, bias; weight [N], the gradient that arrives at each row's loss; codes [N], [M] where
pairs carry ids (masked.py). Writes: row_loss [N]; with gradients also blocks of gain * G and slope [N] = sum_j G_ij, in
the same pass. Never holds: more than `workspace` bytes of G or of partial sums. The tiles leave the own positives out:
their part is O(N) work in float32.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels import configs
from fastclip.kernels.backward import waves
from fastclip.kernels.forward import combine, store_positives
from fastclip.kernels.gradient import gain_constants, store_tile
from fastclip.kernels.masked import matches_in_tile
from fastclip.kernels.operands import Operand
from fastclip.kernels.tiles import LOG2_E, UNGAIN, dot_tile, inside, positive_in_tile, tile_of


@triton.jit
def softplus(t, e):
    """log(1 + exp(t)) from e = exp(-|t|).

    log(1 + e) is e times a polynomial, the Chebyshev fit of log(1 + e) / e on [0, 1] to 3e-8: small values keep their
    relative accuracy, which 1 + e would round away.
    """
    p = 0.005126102140966913
    p = p * e - 0.0290740646774942
    p = p * e + 0.07751608674036942
    p = p * e - 0.13602247622479405
    p = p * e + 0.19076880735747795
    p = p * e - 0.24835398988515545
    p = p * e + 0.3331812170753319
    p = p * e - 0.49999444976340096
    p = p * e + 0.9999999659255097
    return tl.maximum(t, 0.0) + e * p


@triton.jit
def tile_logits(
    p_x, p_y, p_positive, p_scale, p_bias, p_pos, row, col, first_col, N, M,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t of the tile at (row, col) of a block that starts at column first_col of S; stores the positives it meets."""
    acc = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION)
    scale = tl.load(p_scale).to(tl.float32)
    store_positives(p_pos, acc, scale, positive_in_tile(p_positive, row, col + first_col, N, BN, BM), row, BN, BM)
    return acc * scale + tl.load(p_bias).to(tl.float32)


@triton.jit
def store_row_sums(p_part, values, p_positive, row, col, first_col, i_m, N, M, BN: tl.constexpr, BM: tl.constexpr):
    """part [tiles_m, N]: the tile's row sums of `values` off the positives."""
    place = positive_in_tile(p_positive, row, col + first_col, N, BN, BM)
    if (tl.max(place, 0) >= 0) | (row + BN > N) | (col + BM > M):
        hit = place[:, None] == tl.arange(0, BM)[None, :]
        values = tl.where(inside(row, col, N, M, BN, BM) & ~hit, values, 0.0)
    o_n = row + tl.arange(0, BN)
    tl.store(p_part + i_m.to(tl.int64) * N + o_n, tl.sum(values, 1), mask=o_n < N)


@triton.jit
def weight_block(p_weight, p_const, row, N, BN: tl.constexpr):
    """gain * weight [BN, 1]."""
    o_n = row + tl.arange(0, BN)
    return (tl.load(p_weight + o_n, mask=o_n < N, other=0.0) / tl.load(p_const + UNGAIN))[:, None]


@triton.jit(do_not_specialize=["N", "M", "first_col"])
def sigmoid_kernel(
    p_x, p_y, p_positive, p_scale, p_bias, p_loss_part, p_pos, N, M, first_col,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the value."""
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    t = tile_logits(p_x, p_y, p_positive, p_scale, p_bias, p_pos, row, col, first_col, N, M, DP, BN, BM, BD, PRECISION)
    loss = softplus(t, tl.exp2(-tl.abs(t) * LOG2_E))
    store_row_sums(p_loss_part, loss, p_positive, row, col, first_col, i_m, N, M, BN, BM)


@triton.jit(do_not_specialize=["N", "M", "first_col"])
def sigmoid_gradient_kernel(
    p_x, p_y, p_positive, p_scale, p_bias, p_loss_part, p_pos, p_const, p_weight, p_slope_part, p_g,
    N, M, first_col, ld,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the value and of gain * G."""
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    t = tile_logits(p_x, p_y, p_positive, p_scale, p_bias, p_pos, row, col, first_col, N, M, DP, BN, BM, BD, PRECISION)
    e = tl.exp2(-tl.abs(t) * LOG2_E)
    store_row_sums(p_loss_part, softplus(t, e), p_positive, row, col, first_col, i_m, N, M, BN, BM)
    g = tl.where(t >= 0.0, 1.0, e) / (1.0 + e) * weight_block(p_weight, p_const, row, N, BN)
    store_row_sums(p_slope_part, g, p_positive, row, col, first_col, i_m, N, M, BN, BM)
    store_tile(p_g, g, p_positive, row, col, first_col, N, M, ld, BN, BM)


@triton.jit(do_not_specialize=["N", "M", "first_col", "match_is_positive"])
def matched_sigmoid_kernel(
    p_x, p_y, p_positive, p_scale, p_bias, p_loss_part, p_pos, p_row_code, p_col_code, N, M, first_col,
    match_is_positive,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the value where pairs carry ids: matches are positives too, or are left out."""
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    t = tile_logits(p_x, p_y, p_positive, p_scale, p_bias, p_pos, row, col, first_col, N, M, DP, BN, BM, BD, PRECISION)
    match = matches_in_tile(p_row_code, p_col_code, row, col, N, M, BN, BM)
    loss = softplus(tl.where(match, -t, t), tl.exp2(-tl.abs(t) * LOG2_E))
    loss = tl.where(match & (match_is_positive == 0), 0.0, loss)
    store_row_sums(p_loss_part, loss, p_positive, row, col, first_col, i_m, N, M, BN, BM)


@triton.jit(do_not_specialize=["N", "M", "first_col", "match_is_positive"])
def matched_sigmoid_gradient_kernel(
    p_x, p_y, p_positive, p_scale, p_bias, p_loss_part, p_pos, p_row_code, p_col_code, p_const, p_weight,
    p_slope_part, p_g, N, M, first_col, match_is_positive, ld,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the value and of gain * G where pairs carry ids."""
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    t = tile_logits(p_x, p_y, p_positive, p_scale, p_bias, p_pos, row, col, first_col, N, M, DP, BN, BM, BD, PRECISION)
    match = matches_in_tile(p_row_code, p_col_code, row, col, N, M, BN, BM)
    left_out = match & (match_is_positive == 0)
    t = tl.where(match, -t, t)
    e = tl.exp2(-tl.abs(t) * LOG2_E)
    loss = tl.where(left_out, 0.0, softplus(t, e))
    store_row_sums(p_loss_part, loss, p_positive, row, col, first_col, i_m, N, M, BN, BM)
    g = tl.where(t >= 0.0, 1.0, e) / (1.0 + e) * weight_block(p_weight, p_const, row, N, BN)
    g = tl.where(left_out, 0.0, tl.where(match, -g, g))
    store_row_sums(p_slope_part, g, p_positive, row, col, first_col, i_m, N, M, BN, BM)
    store_tile(p_g, g, p_positive, row, col, first_col, N, M, ld, BN, BM)


class SigmoidPass:
    """One pass over S: `value` of some rows, or, with a weight [N], a Filler for backward.waves."""

    def __init__(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor, positive: Tensor, precision: str,
                 weight: Tensor | None, codes: tuple[Tensor, Tensor] | None, match_is_positive: bool):  # fmt: skip
        self.x, self.y, self.positive, self.weight = x.rows, y.rows, positive, weight
        self.scale, self.bias, self.precision = scale, bias, precision
        self.codes, self.match_is_positive = codes, match_is_positive
        kernel = "sigmoid" if weight is None else "sigmoid_gradient"
        self.tiles = configs.choose(kernel, x.rows, precision, max(len(x.rows), len(y.rows)))
        self.loss, self.pos = torch.empty_like(x.norm), torch.empty_like(x.norm)
        if weight is not None:
            self.slope, self.own = torch.empty_like(x.norm), torch.empty_like(x.norm)
            self.const = gain_constants(scale, weight.abs().amax())

    def row_loss(self) -> Tensor:
        """[N], the own positives among them."""
        return self.loss + F.softplus(-(self.pos + self.bias), threshold=50.0)

    def grad_bias(self) -> Tensor:
        """0-d float64."""
        return self.slope.sum(dtype=torch.float64) * self.const[UNGAIN.value] + self.own.sum(dtype=torch.float64)

    def value(self, rows: slice) -> None:
        """loss and pos of some rows."""
        cols = slice(0, len(self.y))
        launch, part, parts = self._launch(rows, cols)
        kernel = sigmoid_kernel if self.codes is None else matched_sigmoid_kernel
        kernel[(self.tiles.count(rows.stop - rows.start, cols.stop),)](**launch)
        combine(part, self.loss[rows], parts, first=True)

    def fill(self, g: Tensor, rows: slice, cols: slice) -> None:
        """g[:n, :m] = gain * G[rows, cols]; loss, slope, pos and, after the last block, own of the rows."""
        launch, part, parts = self._launch(rows, cols)
        slope_part = torch.empty_like(part)
        kernel = sigmoid_gradient_kernel if self.codes is None else matched_sigmoid_gradient_kernel
        kernel[(self.tiles.count(rows.stop - rows.start, cols.stop - cols.start),)](
            p_const=self.const, p_weight=self.weight[rows], p_slope_part=slope_part, p_g=g, ld=g.stride(0), **launch
        )
        combine(part, self.loss[rows], parts, first=cols.start == 0)
        combine(slope_part, self.slope[rows], parts, first=cols.start == 0)
        if cols.stop == len(self.y):
            self.own[rows] = -self.weight[rows] * torch.sigmoid(-(self.pos[rows] + self.bias))

    def _launch(self, rows: slice, cols: slice) -> tuple[dict[str, object], Tensor, int]:
        """Keyword arguments of a launch, its partial row losses and how many they are per row."""
        n, m = rows.stop - rows.start, cols.stop - cols.start
        parts = triton.cdiv(m, self.tiles.BM)
        part = torch.empty(parts * n, dtype=torch.float32, device=self.x.device)
        launch = {
            "p_x": self.x[rows], "p_y": self.y[cols], "p_positive": self.positive[rows], "p_scale": self.scale,
            "p_bias": self.bias, "p_loss_part": part, "p_pos": self.pos[rows], "N": n, "M": m,
            "first_col": cols.start, "DP": self.x.shape[1], "PRECISION": self.precision, **self.tiles.launch(),
        }  # fmt: skip
        if self.codes is not None:
            row_code, col_code = self.codes[0][rows], self.codes[1][cols]
            launch |= {"p_row_code": row_code, "p_col_code": col_code, "match_is_positive": int(self.match_is_positive)}
        return launch, part, parts


def sigmoid_loss(
    x: Tensor, y: Tensor, x_op: Operand, y_op: Operand, scale: Tensor, bias: Tensor, positive: Tensor,
    weight: Tensor, codes: tuple[Tensor, Tensor] | None, match_is_positive: bool, needs: list[bool],
    precision: str, workspace: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """row_loss [N], dx, dy in `dtype`, dscale, dbias (contract: fastclip/sigmoid.py); None where not needed."""
    wanted = weight if any(needs) else None
    run = SigmoidPass(x_op, y_op, scale, bias, positive, precision, wanted, codes, match_is_positive)
    if not any(needs):
        step = configs.partial_rows(run.tiles, len(y), workspace)
        for start in range(0, len(x), step):
            run.value(slice(start, min(start + step, len(x))))
        return run.row_loss(), None, None, None, None
    dx, dy, dscale = waves(run, x, y, x_op, y_op, positive, run.own, needs[:3], workspace, dtype)
    return run.row_loss(), dx, dy, dscale, run.grad_bias() if needs[3] else None
