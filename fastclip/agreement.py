"""What distillation adds to the softmax losses: the teacher's distribution as eq. 6's G, and its products (eq. 14).

Legend: image, text the student's unit rows [n, D] and [N, D]; x, y the teacher's; P [n, N] the teacher's softmax over
rows and over columns, averaged.
"""

import torch
from torch import Tensor

from fastclip import ops
from fastclip.registry import scaled
from fastclip.softmax import cross_entropy, gap


def teacher_weights(sums: tuple[Tensor, ...], pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, d) of eq. 6 that make P / N of the teacher's sums (ops.similarity_sums' five) over `pairs` N."""
    row_sum, col_sum, row_shift, col_shift, pos = sums
    row_lse = pos + cross_entropy(gap(row_sum, row_shift, pos))
    col_lse = pos + cross_entropy(gap(col_sum, col_shift, pos))
    a, b = torch.exp(row_shift - row_lse), torch.exp(col_shift - col_lse)
    d = torch.exp(pos - row_lse) + torch.exp(pos - col_lse)
    return tuple(0.5 / pairs * weight.to(pos.dtype) for weight in (a, b, d))


def agreement(image: Tensor, text: Tensor, teacher: tuple, normalize: bool, backend: str | None) -> Tensor:
    """sum_ij P_ij <image_i, text_j> / N, 0-d, differentiable in image and text.

    teacher: x, y, scale, positives, row shift, column shift and the weights (a, b, d).
    """
    return _Agreement.apply(image, text, *teacher, normalize, backend)[0]


class _Agreement(torch.autograd.Function):
    """sum_ij P_ij <image_i, text_j>, bilinear: the two products that its value needs are its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(image, text, x, y, scale, own, row_shift, col_shift, a, b, d, normalize, backend):
        by_row, by_col = ops.similarity_products(
            x, y, scale, own, (row_shift, col_shift), (a, b, d), normalize, image, text, backend
        )
        return (image * by_row).sum(), by_row, by_col

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def backward(ctx, upstream, *_):
        image, text, *grads = ctx.saved_tensors
        return *scaled(upstream, (image, text), grads), *(None,) * 11
