"""Chunked PyTorch: every device torch runs on, in bounded workspace. Also the plainest telling of the algorithm.

Legend: x [N, D], y [M, D]; S [rows, M] one chunk of logits; p [rows] the positives' columns. Equations: docs/math.md.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.backends.shift import finite_or_zero, fixed_shift, needs_exact_path
from fastclip.checks import accumulation_dtype

CHUNK_ELEMENTS = 2**22  # elements of one chunk of S: 16 MiB in float32; about three such chunks are alive at once


def why_not(x: Tensor | None) -> str | None:
    return None


def describe() -> str:
    return "chunked PyTorch, any device"


def similarity_sums(x: Tensor, y: Tensor, scale: Tensor, positive: Tensor, normalize: bool):
    """The operator's contract: ops.py."""
    xn, yn = _prepare(x, normalize)[0], _prepare(y, normalize)[0]
    lengths = 1.0 if normalize else xn.norm(dim=1).max() * yn.norm(dim=1).max()
    shift = fixed_shift(scale * lengths, len(x), len(y))
    row_shift, col_shift = shift.expand(len(x)).clone(), shift.expand(len(y)).clone()
    row_sum, col_sum, pos = _sums(xn, yn, scale, positive, row_shift, col_shift)
    if needs_exact_path(row_sum, col_sum, len(x), len(y)):
        row_shift, col_shift = _negative_maxima(xn, yn, scale, positive)
        row_sum, col_sum, pos = _sums(xn, yn, scale, positive, row_shift, col_shift)
    return row_sum, col_sum, row_shift, col_shift, pos


def similarity_sums_backward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs):
    """Gradients of x, y and scale; an empty tensor where `needs` says no."""
    (xn, x_length), (yn, y_length) = _prepare(x, normalize), _prepare(y, normalize)
    dx, dy = torch.zeros_like(xn), torch.zeros_like(yn)
    one_shift = _is_one_shift(row_shift, col_shift)
    for rows, S, p in _chunks(xn, yn, scale, positive):
        if one_shift:
            G = torch.exp_(S.sub_(row_shift[0])).mul_(a[rows, None] + b)
        else:
            G = torch.exp(S - row_shift[rows, None]).mul_(a[rows, None])
            G += torch.exp_(S.sub_(col_shift)).mul_(b)
        G.scatter_(1, p, d[rows, None])
        dx[rows] = G @ yn
        dy.addmm_(G.T, xn[rows])
    inner = (xn * dx).sum(1)
    grads = (
        _unnormalize(dx.mul_(scale), xn, inner.mul(scale), x_length, x.dtype) if needs[0] else x.new_empty(0),
        _unnormalize(dy.mul_(scale), yn, None, y_length, y.dtype) if needs[1] else y.new_empty(0),
        inner.sum().to(scale.dtype) if needs[2] else scale.new_empty(0),
    )
    return grads


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


def _prepare(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """x^ [N, D] in the accumulation dtype and the lengths [N, 1] it was divided by (F.normalize's eps)."""
    x = x.to(accumulation_dtype(x.dtype))
    if not normalize:
        return x, None
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
    return x / length, length


def _chunks(xn: Tensor, yn: Tensor, scale: Tensor, positive: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row ranges with their logits S [rows, M] and the positives' columns [rows, 1]."""
    step = max(1, CHUNK_ELEMENTS // len(yn))
    for start in range(0, len(xn), step):
        rows = slice(start, min(start + step, len(xn)))
        yield rows, (xn[rows] @ yn.T).mul_(scale), positive[rows, None]


def _sums(xn, yn, scale, positive, row_shift, col_shift):
    """row_sum, col_sum and pos under the given shifts: one exp per entry where both shifts are the same."""
    one_shift = _is_one_shift(row_shift, col_shift)
    row_sum, pos = torch.empty_like(row_shift), torch.empty_like(row_shift)
    col_sum = torch.zeros_like(col_shift)
    for rows, S, p in _chunks(xn, yn, scale, positive):
        pos[rows] = S.gather(1, p)[:, 0]
        E = torch.exp(S - row_shift[rows, None]).scatter_(1, p, 0.0)
        row_sum[rows] = E.sum(1)
        col_sum += (E if one_shift else torch.exp_(S.sub_(col_shift)).scatter_(1, p, 0.0)).sum(0)
    return row_sum, col_sum, pos


def _negative_maxima(xn, yn, scale, positive):
    """The largest negative of every row [N] and column [M]; 0 where there is none."""
    row_max = torch.zeros(len(xn), dtype=xn.dtype, device=xn.device)
    col_max = torch.full((len(yn),), -torch.inf, dtype=yn.dtype, device=yn.device)
    for rows, S, p in _chunks(xn, yn, scale, positive):
        S.scatter_(1, p, -torch.inf)
        row_max[rows] = S.amax(1)
        col_max = torch.maximum(col_max, S.amax(0))
    return finite_or_zero(row_max), finite_or_zero(col_max)


def _is_one_shift(row_shift: Tensor, col_shift: Tensor) -> bool:
    return bool((row_shift == row_shift[0]).all() and (col_shift == row_shift[0]).all())


def _unnormalize(grad: Tensor, xn: Tensor, inner: Tensor | None, length: Tensor | None, dtype: torch.dtype):
    """Backward of x^ = x / |x|: (grad - x^ <x^, grad>) / |x| (math.md, eq. 8); a clamped length is a constant."""
    if length is None:
        return grad.to(dtype)
    inner = (xn * grad).sum(1) if inner is None else inner
    inner = torch.where(length[:, 0] > 1e-12, inner, 0.0)
    return grad.addcmul_(xn, inner[:, None], value=-1).div_(length).to(dtype)
