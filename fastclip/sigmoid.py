"""The pairwise sigmoid's operator: schema, fake kernel and autograd (math.md, eq. 11).

Legend: x [N, D], y [M, D] features; scale, bias 0-d; positive [N] int64, the column of each row's positive; z_ij is 1
on positives and -1 elsewhere. Pairs with equal ids in the mask are left out, or count as positives.
"""

import torch
from torch import Tensor

from fastclip import backends
from fastclip.checks import accumulation_dtype
from fastclip.ops import NO_MASK, Mask
from fastclip.registry import early_or_empty, register, same_device, scaled, wanted, with_signature


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
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, y, scale, bias)]
    args = (x, y, scale, bias, positive, row_weight, normalize, needs, backend or "", *mask[:2], match_is_positive)
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


@with_signature
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
        ctx.set_materialize_grads(False)  # no zeros for the gradients' own gradients: they are as large as the features
        ctx.save_for_backward(*inputs[:4], *grads)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        inputs, grads = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        return *wanted(scaled(upstream, inputs, grads), ctx.needs_input_grad[:4]), *(None,) * 8


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
        inputs = (x, y, scale, bias)
        if torch.is_grad_enabled():
            grads = scaled(torch.ones_like(scale), inputs, grads)
        else:
            grads = [grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True)]
        return *wanted(grads, needs), *(None,) * 7


def _sigmoid(x, y, scale, bias, positive, row_weight, normalize, needs, backend, ids=None, col_ids=None, match=False):
    run = backends.choose(x, backend).sigmoid_loss
    return run(x, y, scale, bias, positive, row_weight, normalize, needs, Mask(ids, col_ids), match)


def _fake_sigmoid(
    x, y, scale, bias, positive, row_weight, normalize, needs, backend, ids=None, col_ids=None, match=False
):
    same_device(x, y, scale, bias, positive, row_weight, ids, col_ids)
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype)), *early_or_empty((x, y, scale, bias), needs)


register(
    "sigmoid_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor positive, Tensor row_weight, bool normalize,"
    " bool[4] needs, str backend, Tensor? row_ids=None, Tensor? col_ids=None, bool match_is_positive=False)"
    " -> (Tensor row_loss, Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)",
    _sigmoid,
    _fake_sigmoid,
)
