"""Operator schemas, fake kernels and autograd. The quadratic work of every loss is one of these operators.

Legend: x [N, D], y [M, D] features; scale, bias 0-d; positive [N] int64, the column of each row's positive.
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


class Mask(NamedTuple):
    """Pairs that are no negatives: row_ids [N] equal to col_ids [M], int64, or S above row_limit [N] / col_limit [M]."""

    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None


NO_MASK = Mask()

_lib = torch.library.Library("fastclip", "DEF")
_MASK = "Tensor? row_ids=None, Tensor? col_ids=None, Tensor? row_limit=None, Tensor? col_limit=None"
_lib.define(
    f"similarity_sums(Tensor x, Tensor y, Tensor scale, Tensor positive, bool normalize, str backend, {_MASK})"
    " -> (Tensor row_sum, Tensor col_sum, Tensor row_shift, Tensor col_shift, Tensor pos)"
)
_lib.define(
    "similarity_sums_backward(Tensor x, Tensor y, Tensor scale, Tensor positive, Tensor row_shift, Tensor col_shift,"
    " Tensor grad_row_sum, Tensor grad_col_sum, Tensor grad_pos, bool normalize, bool[3] needs, str backend,"
    f" {_MASK}) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)"
)
_lib.define(
    "similarity_ranks(Tensor x, Tensor y, Tensor scale, Tensor rows, Tensor cols, bool normalize, str backend)"
    " -> (Tensor row_rank, Tensor col_rank)"
)
_lib.define(
    "sigmoid_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor positive, Tensor row_weight, bool normalize,"
    " bool[4] needs, str backend, Tensor? row_ids=None, Tensor? col_ids=None, bool match_is_positive=False)"
    " -> (Tensor row_loss, Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)"
)


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


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    positive: Tensor,
    row_weight: Tensor,
    normalize: bool,
    backend: str | None,
    mask: Mask = NO_MASK,
    match_is_positive: bool = False,
) -> Tensor:
    """sum_ij row_weight_i softplus(-z_ij (S_ij + bias)), 0-d (math.md, eq. 11); z is 1 on positives, -1 elsewhere.

    One pass gives the value and every gradient that is wanted; without gradients only the value is computed.
    row_weight [N] is a constant. Pairs of equal ids are left out, or count as positives.
    """
    wanted = (x, y, scale, bias)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in wanted]
    args = (*wanted, positive, row_weight, normalize, needs, backend or "", *mask[:2], match_is_positive)
    return _SigmoidLoss.apply(*args)[0]


def sigmoid_row_losses(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    positive: Tensor,
    ones: Tensor,
    normalize: bool,
    backend: str | None,
    mask: Mask = NO_MASK,
    match_is_positive: bool = False,
) -> Tensor:
    """Each row's loss [N]: its gradient's weights come from above, so that backward takes a pass of its own."""
    return _SigmoidRows.apply(x, y, scale, bias, positive, ones, normalize, backend or "", *mask[:2], match_is_positive)


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

    @staticmethod
    def backward(ctx, grad_row_sum, grad_col_sum, _row_shift, _col_shift, grad_pos):
        x, y, scale, positive, row_shift, col_shift, *mask = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        weights = (grad_row_sum, grad_col_sum, grad_pos)
        grads = _SimilaritySumsBackward.apply(
            x, y, scale, positive, row_shift, col_shift, *weights, ctx.normalize, needs, ctx.backend, *mask
        )
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 7


class _SimilaritySumsBackward(torch.autograd.Function):
    """A node of its own, tied to every input, so that differentiating twice raises on every path."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend, m0, m1, m2, m3):
        return torch.ops.fastclip.similarity_sums_backward(
            x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend, m0, m1, m2, m3
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError(ONCE)


ONCE = "fastclip losses are differentiable once: a gradient of their gradient is not available"


class _SigmoidLoss(torch.autograd.Function):
    """The gradients come with the value; backward only multiplies them by what comes from above."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale, bias, positive, row_weight, normalize, needs, backend, row_ids, col_ids, match):
        row_loss, *grads = torch.ops.fastclip.sigmoid_loss(
            x, y, scale, bias, positive, row_weight, normalize, needs, backend, row_ids, col_ids, match
        )
        return (row_weight * row_loss).sum(), *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *grads = output
        ctx.mark_non_differentiable(*grads)
        ctx.save_for_backward(*inputs[:4], *grads)

    @staticmethod
    def backward(ctx, upstream, *_):
        inputs, grads = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        scaled = _ScaleOnce.apply(upstream, *inputs, *grads)
        wanted = zip(scaled, ctx.needs_input_grad[:4], strict=True)
        return *(grad if need else None for grad, need in wanted), *(None,) * 8


class _SigmoidRows(torch.autograd.Function):
    """The losses of the rows apart: the value first, the gradients once the rows' weights are known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale, bias, positive, ones, normalize, backend, row_ids, col_ids, match):
        value_only = [False] * 4
        return torch.ops.fastclip.sigmoid_loss(
            x, y, scale, bias, positive, ones, normalize, value_only, backend, row_ids, col_ids, match
        )[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, scale, bias, positive, _, ctx.normalize, ctx.backend, row_ids, col_ids, ctx.match = inputs
        ctx.save_for_backward(x, y, scale, bias, positive, row_ids, col_ids)

    @staticmethod
    def backward(ctx, upstream):
        x, y, scale, bias, positive, row_ids, col_ids = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        grads = torch.ops.fastclip.sigmoid_loss(
            x, y, scale, bias, positive, upstream, ctx.normalize, needs, ctx.backend, row_ids, col_ids, ctx.match
        )[1:]
        grads = _ScaleOnce.apply(torch.ones_like(scale), x, y, scale, bias, *grads)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 7


class _ScaleOnce(torch.autograd.Function):
    """upstream times each gradient, tied to the inputs so that differentiating twice raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(upstream, x, y, scale, bias, grad_x, grad_y, grad_scale, grad_bias):
        return tuple((upstream * grad).to(grad.dtype) for grad in (grad_x, grad_y, grad_scale, grad_bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError(ONCE)


def _sums(x, y, scale, positive, normalize, backend, *mask):
    return backends.choose(x, backend).similarity_sums(x, y, scale, positive, normalize, Mask(*mask))


def _sums_backward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend, *mask):
    run = backends.choose(x, backend).similarity_sums_backward
    return run(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, Mask(*mask))


def _ranks(x, y, scale, rows, cols, normalize, backend):
    return backends.choose(x, backend).similarity_ranks(x, y, scale, rows, cols, normalize)


def _sigmoid(x, y, scale, bias, positive, row_weight, normalize, needs, backend, ids=None, col_ids=None, match=False):
    run = backends.choose(x, backend).sigmoid_loss
    return run(x, y, scale, bias, positive, row_weight, normalize, needs, Mask(ids, col_ids), match)


def _fake_sums(x, y, scale, positive, normalize, backend, *mask):
    _same_device(x, y, scale, positive, *mask)
    rows = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    cols = y.new_empty(y.shape[0], dtype=rows.dtype)
    return rows, cols, torch.empty_like(rows), torch.empty_like(cols), torch.empty_like(rows)


def _fake_sums_backward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend, *mask):
    _same_device(x, y, scale, positive, row_shift, col_shift, a, b, d, *mask)
    return _like_or_empty((x, y, scale), needs)


def _fake_ranks(x, y, scale, rows, cols, normalize, backend):
    _same_device(x, y, scale, rows, cols)
    return rows.new_empty(x.shape[0]), cols.new_empty(y.shape[0])


def _fake_sigmoid(
    x, y, scale, bias, positive, row_weight, normalize, needs, backend, ids=None, col_ids=None, match=False
):
    _same_device(x, y, scale, bias, positive, row_weight, ids, col_ids)
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype)), *_like_or_empty((x, y, scale, bias), needs)


def _like_or_empty(tensors, needs) -> tuple[Tensor, ...]:
    """A contiguous gradient for what is needed, an empty tensor for the rest: what every backend returns."""
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip(tensors, needs, strict=True))


def _vmap_by_loop(op):
    """A batch of problems one after the other: each is large enough to fill the machine."""

    def rule(info, in_dims, *args):
        runs = [
            op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(output) for output in zip(*runs, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def _same_device(*tensors: Tensor | None) -> None:
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"fastclip operators take tensors of one device, got {', '.join(sorted(devices))}")


for _name, _impl, _fake in (
    ("similarity_sums", _sums, _fake_sums),
    ("similarity_sums_backward", _sums_backward, _fake_sums_backward),
    ("similarity_ranks", _ranks, _fake_ranks),
    ("sigmoid_loss", _sigmoid, _fake_sigmoid),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastclip::{_name}", _fake, lib=_lib)
    torch.library.register_vmap(f"fastclip::{_name}", _vmap_by_loop(getattr(torch.ops.fastclip, _name)), lib=_lib)
