"""What the ranks send each other: rows to all, sums to their owners, single numbers. Uneven shares everywhere.

Legend: sizes: the number of rows of each rank; t [n_r, ...] this rank's rows; [N, ...] those of all ranks in order.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip.checks import accumulation_dtype

# torch 2.13 renamed it; the old name warns there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_rows(t: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """[N, ...] from every rank's t [n_r, ...]; the gradient goes back to the rows' owners, summed over the ranks."""
    return _AllRows.apply(t, sizes, group)


def whole(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of t over the ranks, the last step before the loss that every rank returns.

    Its gradient is W times this rank's share, which averaging over the ranks turns into the whole batch's.
    """
    return _Whole.apply(t, group)


def sum_over_ranks(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of t over the ranks, for what each rank goes on computing with: its gradient is summed likewise."""
    return _SumOverRanks.apply(t, group)


def gather_rows(t: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """[N, ...] from every rank's t [n_r, ...], without a gradient. Uneven shares travel padded to the largest."""
    largest = max(sizes)
    t = t.detach()
    if len(t) < largest:
        t = torch.cat([t, t.new_zeros(largest - len(t), *t.shape[1:])])
    everyone = t.new_empty(len(sizes) * largest, *t.shape[1:])
    _all_gather_single(everyone, t.contiguous(), group=group)
    if min(sizes) == largest:
        return everyone
    return torch.cat([part[:n] for part, n in zip(everyone.split(largest), sizes, strict=True)])


def to_owners(t: Tensor, sizes: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """[W, n_r, ...]: what each rank has for this rank's rows, from every rank's t [N, ...]. No gradient."""
    own = sizes[dist.get_rank(group)]
    received = t.new_empty(len(sizes) * own, *t.shape[1:])
    dist.all_to_all_single(received, t.contiguous(), [own] * len(sizes), list(sizes), group=group)
    return received.view(len(sizes), own, *t.shape[1:])


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, sizes, group):
        ctx.sizes, ctx.group = sizes, group
        return gather_rows(t, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # A reduce-scatter made of an all-to-all: as many bytes, uneven shares, one rounding, one order of summation,
        # and there on every backend.
        parts = to_owners(grad, ctx.sizes, ctx.group)
        return parts.sum(0, dtype=accumulation_dtype(grad.dtype)).to(grad.dtype), None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.world = dist.get_world_size(group)
        return all_reduce(t, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.world, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return all_reduce(t, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


def all_reduce(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of t over the ranks, a new tensor without a gradient."""
    total = t.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
