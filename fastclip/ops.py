"""The softmax losses' operators: schemas, fake kernels and autograd. All quadratic work is here or in sigmoid.py.

Legend: x [N, D], y [M, D] features; scale 0-d; positive [N] int64, the column of each row's positive.
All sums are taken over the negatives only (math.md, eq. 2):

    row_sum_i = sum_{j != positive_i}    exp(S_ij - row_shift_i)      [N]
    col_sum_j = sum_{i: positive_i != j} exp(S_ij - col_shift_j)      [M]
    pos_i     = S_{i, positive_i}                                     [N]

Vectors are float32 (float64 for float64 features), natural log. The shifts are constants: they carry no gradient.
A mask takes further pairs out of the negatives (eq. 10): equal ids, or a score above the row's (column's) limit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastclip import backends
from fastclip.checks import accumulation_dtype
from fastclip.registry import LastGradient, like_or_empty, register, same_device, wanted, with_signature


class Mask(NamedTuple):
    """Pairs that are no negatives: row_ids [N] equal to col_ids [M] int64, or S above row_limit [N], col_limit [M]."""

    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None


NO_MASK = Mask()


def similarity_sums(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor,
    normalize: bool,
    backend: str | None,
    mask: Mask = NO_MASK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_sum, col_sum, row_shift, col_shift, pos (the legend above), differentiable in x, y and scale."""
    return _SimilaritySums.apply(x, y, scale, positive, normalize, backend or "", *mask)


def similarity_ranks(
    x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, cols: Tensor, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """row_rank [N] and col_rank [M], int64: how many entries of a row (column) of S beat its best correct one.

    The correct pairs are (rows[n], cols[n]), int64 [P]. Beats: is not less than or equal, so that a NaN never passes
    for a hit. A row or column without a correct pair is beaten by all its entries. No gradient.
    """
    args = (x.detach(), y.detach(), scale.detach(), rows, cols, normalize, backend or "")
    return torch.ops.fastclip.similarity_ranks(*args)


def similarity_products(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor,
    shifts: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor],
    normalize: bool,
    x_values: Tensor,
    y_values: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(G y_values [N, V], G^T x_values [M, V]) with eq. 6's G from weights (a, b, d): any matrix times such a G.

    x_values [N, V], y_values [M, V], float32 (float64 for float64 features). No gradient.
    """
    args = (x, y, scale, positive, *shifts, *weights, normalize, x_values, y_values, backend or "")
    return torch.ops.fastclip.similarity_products(*args)


@with_signature
class _SimilaritySums(torch.autograd.Function):
    """G_ij = exp(S_ij - shift) (a_i + b_j) off the positives, from the two vectors a and b alone (math.md, eq. 6)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale, positive, normalize, backend, row_ids, col_ids, row_limit, col_limit):
        return torch.ops.fastclip.similarity_sums(
            x, y, scale, positive, normalize, backend, row_ids, col_ids, row_limit, col_limit
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, scale, positive, ctx.normalize, ctx.backend, *mask = inputs
        _, _, row_shift, col_shift, _ = output
        ctx.save_for_backward(x, y, scale, positive, row_shift, col_shift, *mask)
        ctx.mark_non_differentiable(row_shift, col_shift)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient

    @staticmethod
    def backward(ctx, grad_row_sum, grad_col_sum, _row_shift, _col_shift, grad_pos):
        x, y, scale, positive, row_shift, col_shift, *mask = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        given, like = (grad_row_sum, grad_col_sum, grad_pos), (row_shift, col_shift, row_shift)
        weights = [torch.zeros_like(u) if g is None else g for g, u in zip(given, like, strict=True)]
        # Gradients that may be differentiated again are tied to their inputs, so that doing it raises.
        run = _SimilaritySumsBackward.apply if torch.is_grad_enabled() else torch.ops.fastclip.similarity_sums_backward
        grads = run(x, y, scale, positive, row_shift, col_shift, *weights, ctx.normalize, needs, ctx.backend, *mask)
        return *wanted(grads, needs), *(None,) * 7


class _SimilaritySumsBackward(LastGradient):
    @staticmethod
    def forward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend, m0, m1, m2, m3):
        return torch.ops.fastclip.similarity_sums_backward(
            x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend, m0, m1, m2, m3
        )


def _sums(x, y, scale, positive, normalize, backend, row_ids=None, col_ids=None, row_limit=None, col_limit=None):
    mask = Mask(row_ids, col_ids, row_limit, col_limit)
    return backends.choose(x, backend).similarity_sums(x, y, scale, positive, normalize, mask)


def _sums_backward(
    x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend,
    row_ids=None, col_ids=None, row_limit=None, col_limit=None,
):  # fmt: skip
    run, mask = backends.choose(x, backend).similarity_sums_backward, Mask(row_ids, col_ids, row_limit, col_limit)
    return run(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, mask)


def _ranks(x, y, scale, rows, cols, normalize, backend):
    return backends.choose(x, backend).similarity_ranks(x, y, scale, rows, cols, normalize)


def _products(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, x_values, y_values, backend):
    run = backends.choose(x, backend).similarity_products
    return run(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, x_values, y_values)


def _fake_sums(x, y, scale, positive, normalize, backend, row_ids=None, col_ids=None, row_limit=None, col_limit=None):
    same_device(x, y, scale, positive, row_ids, col_ids, row_limit, col_limit)
    rows = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    cols = y.new_empty(y.shape[0], dtype=rows.dtype)
    return rows, cols, torch.empty_like(rows), torch.empty_like(cols), torch.empty_like(rows)


def _fake_sums_backward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend, *rest):
    same_device(x, y, scale, positive, row_shift, col_shift, a, b, d, *rest)
    return like_or_empty((x, y, scale), needs)


def _fake_ranks(x, y, scale, rows, cols, normalize, backend):
    same_device(x, y, scale, rows, cols)
    return rows.new_empty(x.shape[0]), cols.new_empty(y.shape[0])


def _fake_products(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, x_values, y_values, backend):
    same_device(x, y, scale, positive, row_shift, col_shift, a, b, d, x_values, y_values)
    return torch.empty_like(x_values), torch.empty_like(y_values)


_MASK = "Tensor? row_ids=None, Tensor? col_ids=None, Tensor? row_limit=None, Tensor? col_limit=None"
_VECTORS = "Tensor x, Tensor y, Tensor scale, Tensor positive, Tensor row_shift, Tensor col_shift"
register(
    f"similarity_sums(Tensor x, Tensor y, Tensor scale, Tensor positive, bool normalize, str backend, {_MASK})"
    " -> (Tensor row_sum, Tensor col_sum, Tensor row_shift, Tensor col_shift, Tensor pos)",
    _sums,
    _fake_sums,
)
register(
    f"similarity_sums_backward({_VECTORS}, Tensor grad_row_sum, Tensor grad_col_sum, Tensor grad_pos, bool normalize,"
    f" bool[3] needs, str backend, {_MASK}) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    _sums_backward,
    _fake_sums_backward,
)
register(
    "similarity_ranks(Tensor x, Tensor y, Tensor scale, Tensor rows, Tensor cols, bool normalize, str backend)"
    " -> (Tensor row_rank, Tensor col_rank)",
    _ranks,
    _fake_ranks,
)
register(
    f"similarity_products({_VECTORS}, Tensor a, Tensor b, Tensor d, bool normalize, Tensor x_values, Tensor y_values,"
    " str backend) -> (Tensor by_row, Tensor by_col)",
    _products,
    _fake_products,
)
