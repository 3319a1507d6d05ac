"""The CLIP loss without options, in one call: schema, fake kernel and autograd.

A backend may offer `clip_loss`, value and gradients together, and say with `gives_gradients` for which batches: for a
small one the graph around similarity_sums (softmax.py) takes as long as its kernels, and what a bounded workspace holds
of the similarities is made only once.

Legend: x, y [N, D] paired features; scale 0-d; weight [N], a constant.
"""

import torch
from torch import Tensor

from fastclip import backends
from fastclip.registry import early_or_empty, register, same_device, scaled, wanted, with_signature


def serves(x: Tensor, weight: Tensor | None, backend: str | None) -> bool:
    """Whether clip_loss below runs this batch. torch.compile cannot look into the choice of a backend, nor needs to."""
    if torch.compiler.is_compiling() or (weight is not None and weight.requires_grad):
        return False
    chosen = backends.choose(x, backend or "")
    return hasattr(chosen, "gives_gradients") and chosen.gives_gradients(x)


def clip_loss(
    x: Tensor, y: Tensor, scale: Tensor, weight: Tensor | None, mean: bool, normalize: bool, backend: str | None
) -> Tensor:
    """sum_i weight_i loss_i, 0-d, divided by the weights' sum if mean; loss_i: pair i's share of math.md's eq. 3."""
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, y, scale)]
    return _ClipLoss.apply(x, y, scale, weight, mean, normalize, needs, backend or "")[0]


@with_signature
class _ClipLoss(torch.autograd.Function):
    """The gradients come with the value; backward only multiplies them by what comes from above."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale, weight, mean, normalize, needs, backend):
        return torch.ops.fastclip.clip_loss(x, y, scale, weight, mean, normalize, needs, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *grads = output
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *grads)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        inputs, grads = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        return *wanted(scaled(upstream, inputs, grads), ctx.needs_input_grad[:3]), *(None,) * 5


def _clip_loss(x, y, scale, weight, mean, normalize, needs, backend):
    return backends.choose(x, backend).clip_loss(x, y, scale, weight, mean, normalize, needs)


def _fake_clip_loss(x, y, scale, weight, mean, normalize, needs, backend):
    same_device(x, y, scale, weight)
    return torch.empty_like(scale), *early_or_empty((x, y, scale), needs)


register(
    "clip_loss(Tensor x, Tensor y, Tensor scale, Tensor? weight, bool mean, bool normalize, bool[3] needs, str backend)"
    " -> (Tensor loss, Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    _clip_loss,
    _fake_clip_loss,
)
