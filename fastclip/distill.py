"""Distillation of one contrastive model into another, with neither model's N x N matrix held (math.md, eq. 14).

Legend: image, text [N, D] of the student; P [N, N] the teacher's softmax over rows and over columns, averaged.
"""

import torch
from torch import Tensor

from fastclip import checks, ops
from fastclip.registry import ONCE
from fastclip.softmax import Options, cross_entropy, gap, gaps, unit_rows


def distill_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the student's contrastive distributions against the teacher's, mean over both directions.

    Equals `-(T.softmax(1) * S.log_softmax(1)).sum(1).mean() / 2` plus the same with T.T and S.T, where S and T are the
    student's and the teacher's logits (OpenCLIP's DistillClipLoss; Wu et al. 2023). Exact gradients for the student's
    features [N, D] and scale; the teacher's features [N, E] and scale are constants.

    Returns the loss, 0-d, float32 (float64 for float64 features). Raises as clip_loss.
    """
    image, text = checks.features(image_features, text_features, "image_features", "text_features", paired=True)
    names = ("teacher_image_features", "teacher_text_features")
    t_image, t_text = checks.features(teacher_image_features, teacher_text_features, *names, paired=True)
    if len(image) != len(t_image):
        raise ValueError(f"student and teacher must see the same N pairs, got {len(image)} and {len(t_image)}")
    scale = checks.scalar(logit_scale, "logit_scale", image)
    options = Options(normalize=normalize, backend=backend)

    pairs = gaps(image, text, scale, None, options)
    lse = pairs.pos + 0.5 * (cross_entropy(pairs.row_gap) + cross_entropy(pairs.col_gap))
    dtype = checks.accumulation_dtype(image.dtype)
    with torch.no_grad():
        teacher = _teacher(t_image.to(dtype), t_text.to(dtype), teacher_logit_scale, normalize, backend)
    agreement = _Agreement.apply(unit_rows(image, normalize), unit_rows(text, normalize), *teacher, normalize, backend)
    return (lse.mean() - scale * agreement[0]).to(scale.dtype)


def _teacher(image: Tensor, text: Tensor, scale: Tensor | float, normalize: bool, backend: str | None) -> tuple:
    """What makes P out of the teacher's features: x, y, scale, positives, shifts and the weights (a, b, d) of eq. 6."""
    scale = checks.scalar(scale, "teacher_logit_scale", image)
    own = torch.arange(len(image), device=image.device)
    sums = ops.similarity_sums(image, text, scale, own, normalize, backend)
    row_sum, col_sum, row_shift, col_shift, pos = sums
    row_lse = pos + cross_entropy(gap(row_sum, row_shift, pos))
    col_lse = pos + cross_entropy(gap(col_sum, col_shift, pos))
    a, b = torch.exp(row_shift - row_lse), torch.exp(col_shift - col_lse)
    d = torch.exp(pos - row_lse) + torch.exp(pos - col_lse)
    weights = (0.5 / len(image) * weight.to(pos.dtype) for weight in (a, b, d))
    return image, text, scale, own, row_shift, col_shift, *weights


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
        return *_AgreementBackward.apply(upstream, *ctx.saved_tensors), *(None,) * 11


class _AgreementBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(upstream, image, text, by_row, by_col):
        return upstream * by_row, upstream * by_col

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError(ONCE)
