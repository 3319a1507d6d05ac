"""SigLIP's loss over the ranks of a group: each rank its rows against all columns, value and gradients in one pass.

Legend: x [n_r, D], y [n_r, D] this rank's pairs; y_b [m_b, D] a block's keys; N pairs over all ranks.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastclip import backends, sigmoid
from fastclip.distributed.exchange import all_reduce, all_rows, gather_rows, whole
from fastclip.distributed.ring_sigmoid import SigmoidOptions, ring_row_losses, ring_sum
from fastclip.distributed.shards import Shards, agree, not_compiled, tensor_text
from fastclip.ops import NO_MASK, Mask


class SigmoidInputs(NamedTuple):
    """What siglip_loss has checked: x, y [n_r, D], scale and bias 0-d, weight and ids [n_r] or None."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    weight: Tensor | None
    ids: Tensor | None


@not_compiled
def siglip_loss(check: Callable[[], SigmoidInputs], options: SigmoidOptions, group: object, reduction: str) -> Tensor:
    """fastclip.siglip_loss over the ranks of `group`. check: validates this rank's arguments and returns them."""

    def describe(given: SigmoidInputs) -> tuple[int, int, str]:
        n, width = given.image.shape
        backends.choose(given.image, options.backend or "")  # raises where it cannot run
        return n, n, f"siglip_loss D={width} {tensor_text(**given._asdict())} reduction={reduction} {options}"

    (image, text, scale, bias, weight, ids), shards = agree(group, check, describe)
    mask = NO_MASK if ids is None else Mask(ids, gather_rows(ids, shards.cols, shards.group))
    args = (image, text, scale, bias)
    ones = scale.new_ones(len(image))
    if reduction == "none":
        losses = _rows(*args, ones, mask, shards, options)
        return losses if weight is None else losses * weight
    row_weight = ones if weight is None else weight.detach()
    if reduction == "mean":
        total = sum(shards.rows) if weight is None else all_reduce(row_weight.sum().double(), shards.group)
        row_weight = row_weight / total
    share = _sum(*args, row_weight.to(scale.dtype), mask, shards, options)
    return whole(share.double(), shards.group).to(scale.dtype)


def _sum(x, y, scale, bias, row_weight, mask: Mask, shards: Shards, options: SigmoidOptions) -> Tensor:
    """sum_ij row_weight_i loss_ij over this rank's rows and all columns, 0-d."""
    if shards.mode == "ring":
        return ring_sum(x, y, scale, bias, row_weight, mask, shards, options)
    keys, own = all_rows(y, shards.cols, shards.group), shards.own_columns(x)
    rest = (options.normalize, options.backend, mask, options.ids_mode == "positive")
    return sigmoid.sigmoid_loss(x, keys, scale, bias, own, row_weight, *rest)


def _rows(x, y, scale, bias, ones, mask: Mask, shards: Shards, options: SigmoidOptions) -> Tensor:
    """Each row's loss against all columns [n_r]."""
    if shards.mode == "ring":
        return ring_row_losses(x, y, scale, bias, ones, mask, shards, options)
    keys, own = all_rows(y, shards.cols, shards.group), shards.own_columns(x)
    rest = (options.normalize, options.backend, mask, options.ids_mode == "positive")
    return sigmoid.sigmoid_row_losses(x, keys, scale, bias, own, ones, *rest)
