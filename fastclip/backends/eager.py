"""Chunked PyTorch: every device torch runs on, in bounded workspace. Also the plainest telling of the algorithm.

Legend: x [N, D], y [M, D]; S [rows, M] one chunk of logits; p [rows, 1] the positives' columns. Equations:
docs/math.md.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.backends.shift import finite_or_zero, fixed_shift, is_one_shift, needs_exact_path
from fastclip.checks import accumulation_dtype, early_gradient_dtype

CHUNK_ELEMENTS = 2**21  # elements of one chunk of S: 8 MiB in float32; fewer than eight such chunks are alive at once

DEVICE = None


def why_not(x: Tensor | None) -> str | None:
    return None


def describe() -> str:
    return "chunked PyTorch, any device"


def similarity_sums(x: Tensor, y: Tensor, scale: Tensor, positive: Tensor, normalize: bool, mask):
    """The operator's contract: ops.py."""
    xn, yn = _prepare(x, normalize)[0], _prepare(y, normalize)[0]
    largest = 1.0 if normalize else xn.norm(dim=1).max() * yn.norm(dim=1).max()
    shift = fixed_shift(float(scale * largest), len(x), len(y))
    row_shift, col_shift = xn.new_full((len(x),), shift), yn.new_full((len(y),), shift)
    row_sum, col_sum, pos = _sums(xn, yn, scale, positive, row_shift, col_shift, mask)
    if needs_exact_path(row_sum, col_sum):
        row_shift, col_shift = _negative_maxima(xn, yn, scale, positive, mask)
        row_sum, col_sum, pos = _sums(xn, yn, scale, positive, row_shift, col_shift, mask)
    return row_sum, col_sum, row_shift, col_shift, pos


def similarity_sums_backward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, mask):
    """Gradients of x, y and scale; an empty tensor where `needs` says no."""
    (xn, x_length), (yn, y_length) = _prepare(x, normalize), _prepare(y, normalize)
    dx, dy = torch.zeros_like(xn), torch.zeros_like(yn)
    one_shift = is_one_shift(row_shift, col_shift)
    for rows, S, p in _chunks(xn, yn, scale, positive):
        if mask.row_ids is not None:
            # Zeroed after the product: the exponential of a pair left out may overflow, and 0 inf is NaN.
            out_of_rows, out_of_cols = _masked(S, rows, mask)
            G = torch.exp_(S - row_shift[rows, None]).mul_(a[rows, None]).masked_fill_(out_of_rows, 0.0)
            G += torch.exp_(S.sub_(col_shift)).mul_(b).masked_fill_(out_of_cols, 0.0)
        elif one_shift:
            G = torch.exp_(S.sub_(row_shift[0])).mul_(a[rows, None] + b)
        else:
            G = torch.exp_(S - row_shift[rows, None]).mul_(a[rows, None])
            G += torch.exp_(S.sub_(col_shift)).mul_(b)
        G.scatter_(1, p, d[rows, None])
        _add_products(G, rows, xn, yn, dx if needs[0] or needs[2] else None, dy if needs[1] else None)
    inner = (xn * dx).sum(1)
    return (
        _unnormalize(dx.mul_(scale), xn, x_length, x.dtype) if needs[0] else x.new_empty(0),
        _unnormalize(dy.mul_(scale), yn, y_length, y.dtype) if needs[1] else y.new_empty(0),
        inner.sum().to(scale.dtype) if needs[2] else scale.new_empty(0),
    )


def similarity_products(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, x_values, y_values):
    """The operator's contract: ops.py."""
    xn, yn = _prepare(x, normalize).rows, _prepare(y, normalize).rows
    by_row, by_col = torch.empty_like(x_values), torch.zeros_like(y_values)
    for rows, S, p in _chunks(xn, yn, scale, positive):
        G = torch.exp_(S - row_shift[rows, None]).mul_(a[rows, None])
        G += torch.exp_(S.sub_(col_shift)).mul_(b)
        G.scatter_(1, p, d[rows, None])
        _add_products(G, rows, x_values, y_values, by_row, by_col)
    return by_row, by_col


def sigmoid_loss(x, y, scale, bias, positive, row_weight, normalize, needs, mask, match_is_positive):
    """row_loss [N] and the gradients of sum_i row_weight_i row_loss_i; empty tensors where `needs` says no."""
    (xn, x_length), (yn, y_length) = _prepare(x, normalize), _prepare(y, normalize)
    dx, dy = torch.zeros_like(xn), torch.zeros_like(yn)
    row_loss, row_slope = torch.empty_like(row_weight), torch.empty_like(row_weight)
    for rows, S, p in _chunks(xn, yn, scale, positive):
        z = torch.full_like(S, -1.0)
        if mask.row_ids is not None:
            match = mask.row_ids[rows, None] == mask.col_ids
            z.masked_fill_(match, 1.0 if match_is_positive else 0.0)
        z.scatter_(1, p, 1.0)
        t = z * (S + bias)
        used = z != 0
        row_loss[rows] = torch.where(used, F.softplus(-t, threshold=50.0), 0.0).sum(1)
        if any(needs):
            G = torch.where(used, -z * torch.sigmoid(-t), 0.0)
            row_slope[rows] = G.sum(1)
            G *= row_weight[rows, None]
            _add_products(G, rows, xn, yn, dx if needs[0] or needs[2] else None, dy if needs[1] else None)
    dtype = early_gradient_dtype(x.dtype)
    return (
        row_loss,
        _unnormalize(dx * scale, xn, x_length, dtype) if needs[0] else x.new_empty(0, dtype=dtype),
        _unnormalize(dy * scale, yn, y_length, dtype) if needs[1] else y.new_empty(0, dtype=dtype),
        (xn * dx).sum().to(scale.dtype) if needs[2] else scale.new_empty(0),
        (row_weight * row_slope).sum().to(bias.dtype) if needs[3] else bias.new_empty(0),
    )


def similarity_ranks(x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, cols: Tensor, normalize: bool):
    """The operator's contract: ops.py."""
    xn, yn = _prepare(x, normalize)[0], _prepare(y, normalize)[0]
    row_best = torch.full((len(x),), -torch.inf, dtype=xn.dtype, device=x.device)
    col_best = torch.full((len(y),), -torch.inf, dtype=xn.dtype, device=x.device)
    unused = rows.new_zeros(len(x))
    for chunk, S, _ in _chunks(xn, yn, scale, unused):
        here = (rows >= chunk.start) & (rows < chunk.stop)
        scores = S[rows[here] - chunk.start, cols[here]]
        row_best.scatter_reduce_(0, rows[here], scores, "amax")
        col_best.scatter_reduce_(0, cols[here], scores, "amax")
    row_rank = torch.empty(len(x), dtype=torch.int64, device=x.device)
    col_rank = torch.zeros(len(y), dtype=torch.int64, device=x.device)
    for chunk, S, _ in _chunks(xn, yn, scale, unused):
        row_rank[chunk] = (~(S <= row_best[chunk, None])).sum(1)
        col_rank += (~(S <= col_best)).sum(0)
    return row_rank, col_rank


class _Prepared(NamedTuple):
    rows: Tensor  # x^ in the accumulation dtype
    length: Tensor | None  # [N, 1] what x was divided by; None without normalisation


def _prepare(x: Tensor, normalize: bool) -> _Prepared:
    x = x.to(accumulation_dtype(x.dtype))
    if not normalize:
        return _Prepared(x, None)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)  # F.normalize's eps
    return _Prepared(x / length, length)


def _chunks(xn: Tensor, yn: Tensor, scale: Tensor, positive: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row ranges with their logits S [rows, M] and the positives' columns [rows, 1]."""
    step = max(1, CHUNK_ELEMENTS // len(yn))
    for start in range(0, len(xn), step):
        rows = slice(start, min(start + step, len(xn)))
        yield rows, (xn[rows] @ yn.T).mul_(scale), positive[rows, None]


def _masked(S: Tensor, rows: slice, mask) -> tuple[Tensor, Tensor]:
    """Which pairs of a chunk the mask takes out of the rows' sums and out of the columns' (math.md, eq. 10)."""
    match = mask.row_ids[rows, None] == mask.col_ids
    return match | (S > mask.row_limit[rows, None]), match | (S > mask.col_limit)


def _sums(xn, yn, scale, positive, row_shift, col_shift, mask):
    """row_sum, col_sum and pos under the given shifts: one exp per entry where both shifts are the same."""
    one_shift = is_one_shift(row_shift, col_shift)
    row_sum, pos = torch.empty_like(row_shift), torch.empty_like(row_shift)
    col_sum = torch.zeros_like(col_shift)
    for rows, S, p in _chunks(xn, yn, scale, positive):
        pos[rows] = S.gather(1, p)[:, 0]
        by_row = torch.exp_(S - row_shift[rows, None]).scatter_(1, p, 0.0)
        by_col = by_row if one_shift else torch.exp_(S - col_shift).scatter_(1, p, 0.0)
        if mask.row_ids is not None:
            out_of_rows, out_of_cols = _masked(S, rows, mask)
            by_row, by_col = by_row.masked_fill(out_of_rows, 0.0), by_col.masked_fill(out_of_cols, 0.0)
        row_sum[rows] = by_row.sum(1)
        col_sum += by_col.sum(0)
    return row_sum, col_sum, pos


def _negative_maxima(xn, yn, scale, positive, mask):
    """The largest negative of every row [N] and column [M]; 0 where there is none."""
    row_max = torch.zeros(len(xn), dtype=xn.dtype, device=xn.device)
    col_max = torch.full((len(yn),), -torch.inf, dtype=yn.dtype, device=yn.device)
    for rows, S, p in _chunks(xn, yn, scale, positive):
        by_row = by_col = S
        if mask.row_ids is not None:
            out_of_rows, out_of_cols = _masked(S, rows, mask)
            by_row, by_col = S.masked_fill(out_of_rows, -torch.inf), S.masked_fill(out_of_cols, -torch.inf)
        row_max[rows] = by_row.scatter(1, p, -torch.inf).amax(1)
        col_max = torch.maximum(col_max, by_col.scatter(1, p, -torch.inf).amax(0))
    return finite_or_zero(row_max), finite_or_zero(col_max)


def _add_products(G: Tensor, rows: slice, xn: Tensor, yn: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
    if dx is not None:
        dx[rows] = G @ yn
    if dy is not None:
        dy.addmm_(G.T, xn[rows])


def _unnormalize(grad: Tensor, xn: Tensor, length: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Backward of x^ = x / |x|: (grad - x^ <x^, grad>) / |x| (math.md, eq. 8); a clamped length is a constant."""
    if length is None:
        return grad.to(dtype)
    inner = torch.where(length > 1e-12, (xn * grad).sum(1, keepdim=True), 0.0)
    return ((grad - xn * inner) / length).to(dtype)
