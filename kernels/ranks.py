"""Ranks without the matrix: how many entries of each row and column beat its best correct one.

Reads: x~ [N, DP], y~ [M, DP], the correct pairs (rows[n], cols[n]) [P], the scale. Writes: the pairs' scores [P], then
row_count [N] and col_count [M]. Never holds: more than a tile of S.

The scores come from the same tile product, in tiles of the same shape, as the entries they are compared with: a correct
pair ties with itself, and with an exact copy of itself, to the last bit. Counts are added with integer atomics, whose
order does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels import configs
from fastclip.kernels.tiles import dot_tile, inside, tile_of


@triton.jit(do_not_specialize=["P"])
def scores_kernel(
    p_x, p_y, p_scale, p_score, P,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """score [P]: the diagonal of scale * x~ y~^T, both [P, DP]."""
    tl.static_assert(BN == BM)
    row = tl.program_id(0).to(tl.int64) * BN
    acc = dot_tile(p_x, p_y, row, row, P, P, DP, BN, BM, BD, PRECISION)
    o_n = tl.arange(0, BN)
    score = tl.sum(tl.where(o_n[:, None] == o_n[None, :], acc * tl.load(p_scale).to(tl.float32), 0.0), 1)
    tl.store(p_score + row + o_n, score, mask=row + o_n < P)


@triton.jit(do_not_specialize=["N", "M"])
def count_kernel(
    p_x, p_y, p_scale, p_row_best, p_col_best, p_row_count, p_col_count, N, M,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile. An entry counts unless the best is greater or equal, so that a NaN never passes for a hit."""
    i_n, i_m = tile_of(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), GROUP)
    row, col = i_n.to(tl.int64) * BN, i_m.to(tl.int64) * BM
    S = dot_tile(p_x, p_y, row, col, N, M, DP, BN, BM, BD, PRECISION) * tl.load(p_scale).to(tl.float32)
    o_n, o_m = row + tl.arange(0, BN), col + tl.arange(0, BM)
    exists = inside(row, col, N, M, BN, BM)
    row_best = tl.load(p_row_best + o_n, mask=o_n < N, other=0.0)
    in_row = tl.sum((~(row_best[:, None] >= S) & exists).to(tl.int32), 1)
    tl.atomic_add(p_row_count + o_n, in_row, mask=o_n < N)
    col_best = tl.load(p_col_best + o_m, mask=o_m < M, other=0.0)
    in_col = tl.sum((~(col_best[None, :] >= S) & exists).to(tl.int32), 0)
    tl.atomic_add(p_col_count + o_m, in_col, mask=o_m < M)


def similarity_ranks(
    x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, cols: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """row_rank [N], col_rank [M] int64 (contract: fastclip/ops.py)."""
    N, M = len(x), len(y)
    tiles = configs.choose("ranks", x, precision, max(N, M))
    scores = pair_scores(x, y, scale, rows, cols, precision, tiles)
    row_best, col_best = best(scores, rows, N), best(scores, cols, M)
    row_count = torch.zeros(N, dtype=torch.int32, device=x.device)
    col_count = torch.zeros(M, dtype=torch.int32, device=x.device)
    count_kernel[(tiles.count(N, M),)](
        p_x=x, p_y=y, p_scale=scale, p_row_best=row_best, p_col_best=col_best, p_row_count=row_count,
        p_col_count=col_count, N=N, M=M, DP=x.shape[1], PRECISION=precision, **tiles.launch(),
    )  # fmt: skip
    return row_count.long(), col_count.long()


def pair_scores(
    x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, cols: Tensor, precision: str, tiles: configs.Tiles
) -> Tensor:
    """S at the pairs (rows[n], cols[n]), [P] float32."""
    P = len(rows)
    scores = torch.empty(P, dtype=torch.float32, device=x.device)
    launch = tiles.launch()
    del launch["GROUP"]
    if P:
        scores_kernel[(triton.cdiv(P, tiles.BN),)](
            p_x=x.index_select(0, rows), p_y=y.index_select(0, cols), p_scale=scale, p_score=scores, P=P,
            DP=x.shape[1], PRECISION=precision, **launch,
        )  # fmt: skip
    return scores


def best(scores: Tensor, index: Tensor, length: int) -> Tensor:
    """The largest score of each row (column): [length], -inf where it has no correct pair."""
    out = torch.full((length,), -torch.inf, dtype=scores.dtype, device=scores.device)
    return out.scatter_reduce_(0, index, scores, "amax")
