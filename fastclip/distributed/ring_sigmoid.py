"""The pairwise sigmoid round the ring (ring.py): value and gradients in one round.

Legend: x [n_r, D], y [n_r, D] this rank's pairs; y_b [m_b, D] a block's keys; row_weight [n_r]; mask: row_ids of this
rank, col_ids of all ranks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.distributed.ring import Gradients, blocks
from fastclip.distributed.shards import Shards
from fastclip.ops import Mask
from fastclip.registry import wanted


class SigmoidOptions(NamedTuple):
    """siglip_loss's keyword arguments of the same names."""

    normalize: bool
    backend: str | None
    ids_mode: str


def ring_sum(x, y, scale, bias, row_weight, mask: Mask, shards: Shards, options: SigmoidOptions) -> Tensor:
    """sum_ij row_weight_i loss_ij over this rank's rows and all columns, 0-d."""
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, y, scale, bias)]
    return _RingSum.apply(x, y, scale, bias, row_weight, *mask[:2], needs, shards, options)


def ring_row_losses(x, y, scale, bias, ones, mask: Mask, shards: Shards, options: SigmoidOptions) -> Tensor:
    """Each row's loss against all columns [n_r]; ones [n_r]."""
    return _RingRows.apply(x, y, scale, bias, ones, *mask[:2], shards, options)


class _RingSum(torch.autograd.Function):
    """The gradients come with the value: when forward ends, dy has been round the ring."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, row_weight, row_ids, col_ids, needs, shards, options):
        tensors = (x, y, scale, bias, row_weight, Mask(row_ids, col_ids))
        row_loss, grads = _round(*tensors, needs, shards, options)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [tensor.dtype for tensor in (x, y, scale, bias)]
        return (row_weight * row_loss).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grads = (
            (upstream * grad).to(dtype) if need else None
            for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:4], strict=True)
        )
        return *grads, *(None,) * 6


class _RingRows(torch.autograd.Function):
    """The losses of the rows apart: the gradients take a second round, once the rows' weights are known."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, ones, row_ids, col_ids, shards, options):
        mask, ctx.options = Mask(row_ids, col_ids), (shards, options)
        ctx.save_for_backward(x, y, scale, bias, row_ids, col_ids)
        return _round(x, y, scale, bias, ones, mask, [False] * 4, shards, options)[0].to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        *tensors, row_ids, col_ids = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        grads = _round(*tensors, upstream, Mask(row_ids, col_ids), needs, *ctx.options)[1]
        found = (grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))
        return *wanted(list(found), needs), *(None,) * 5


def _round(
    x, y, scale, bias, row_weight, mask: Mask, needs: list[bool], shards: Shards, options: SigmoidOptions
) -> tuple[Tensor, list[Tensor]]:
    """Once round the ring: each row's loss [n_r], float64, and the gradients as the operator returns them."""
    row_loss, dy = scale.new_zeros(len(x), dtype=torch.float64), Gradients(shards)
    dx = torch.zeros_like(x, dtype=scale.dtype) if needs[0] else scale.new_empty(0)
    dscale, dbias = torch.zeros_like(scale), torch.zeros_like(bias)
    for block in blocks(y, shards):
        of_block = mask if mask.row_ids is None else Mask(mask.row_ids, mask.col_ids[block.cols])
        compute = _own_block if block.own else _negatives if mask.row_ids is None else _negatives_or_matches
        loss, *grads = compute(x, block.y, scale, bias, row_weight, of_block, needs, options)
        row_loss += loss
        for total, grad, need in zip((dx, dscale, dbias), (grads[0], *grads[2:]), (needs[0], *needs[2:]), strict=True):
            if need:
                total += grad
        if needs[1]:
            dy.add(grads[1])
    return row_loss, [dx, dy.home() if needs[1] else scale.new_empty(0), dscale, dbias]


def _own_block(x, y, scale, bias, row_weight, mask: Mask, needs, options: SigmoidOptions) -> tuple[Tensor, ...]:
    """row_loss [n_r] and the gradients of x, y, scale and bias: row i's positive is column i."""
    return _operator(x, y, scale, bias, torch.arange(len(x), device=x.device), row_weight, mask, needs, options)


def _negatives(x, y, scale, bias, row_weight, mask: Mask, needs, options: SigmoidOptions) -> tuple[Tensor, ...]:
    """The same for a block without positives. A negative is a positive of the opposite logit: softplus(t)."""
    same = Mask(*(torch.zeros(len(side), dtype=torch.int64, device=x.device) for side in (x, y)))
    all_positive = options._replace(ids_mode="positive")
    loss, dx, dy, dscale, dbias = _operator(x, y, -scale, -bias, same.row_ids, row_weight, same, needs, all_positive)
    return loss, dx, dy, -dscale, -dbias


def _negatives_or_matches(
    x, y, scale, bias, row_weight, mask: Mask, needs, options: SigmoidOptions
) -> tuple[Tensor, ...]:
    """The same for a block whose only positives are equal ids.

    A key of zeros takes the place of every row's positive. Its logit is the bias, so that its loss is known.
    """
    n, m = len(x), len(y)
    keys, ids = torch.cat([y, y.new_zeros(1, y.shape[1])]), torch.cat([mask.col_ids, mask.col_ids[:1]])
    added = torch.full((n,), m, device=x.device)
    mask = Mask(mask.row_ids, ids)
    loss, dx, dy, dscale, dbias = _operator(x, keys, scale, bias, added, row_weight, mask, needs, options)
    wide = bias.double()
    loss = loss - F.softplus(-wide, threshold=50.0)
    if needs[3]:
        dbias = dbias + row_weight.sum() * torch.sigmoid(-wide)
    return loss, dx, dy[:m], dscale, dbias


def _operator(
    x, y, scale, bias, positive, row_weight, mask: Mask, needs, options: SigmoidOptions
) -> tuple[Tensor, ...]:
    ids = mask.row_ids, mask.col_ids
    rest = (options.normalize, needs, options.backend or "", *ids, options.ids_mode == "positive")
    return torch.ops.fastclip.sigmoid_loss(x, y, scale, bias, positive, row_weight, *rest)
