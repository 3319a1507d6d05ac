"""Distillation of one contrastive model into another, with neither model's N x N matrix held (math.md, eq. 14).

Legend: image, text [N, D] of the student; P [N, N] the teacher's softmax over rows and over columns, averaged.
"""

import torch
from torch import Tensor

from fastclip import checks, distributed, ops
from fastclip.agreement import agreement, teacher_weights
from fastclip.softmax import Options, gaps, symmetric_cross_entropy, unit_rows


def distill_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    group: object | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the student's contrastive distributions against the teacher's, mean over both directions.

    Equals `-(T.softmax(1) * S.log_softmax(1)).sum(1).mean() / 2` plus the same with T.T and S.T, where S and T are the
    student's and the teacher's logits (OpenCLIP's DistillClipLoss; Wu et al. 2023). Exact gradients for the student's
    features [N, D] and scale; the teacher's features [N, E] and scale are constants. group: as in clip_loss.

    Returns the loss, 0-d, float32 (float64 for float64 features). Raises as clip_loss.
    """
    options = Options(normalize=normalize, backend=backend)

    def checked():
        image, text = checks.features(image_features, text_features, "image_features", "text_features", paired=True)
        names = ("teacher_image_features", "teacher_text_features")
        t_image, t_text = checks.features(teacher_image_features, teacher_text_features, *names, paired=True)
        if len(image) != len(t_image):
            raise ValueError(f"student and teacher must see the same N pairs, got {len(image)} and {len(t_image)}")
        scale = checks.scalar(logit_scale, "logit_scale", image)
        t_scale = checks.scalar(teacher_logit_scale, "teacher_logit_scale", image).detach()
        t_image, t_text = (t.detach().to(checks.accumulation_dtype(image.dtype)) for t in (t_image, t_text))
        return image, text, scale, t_image, t_text, t_scale, options

    if group is not None:
        return distributed.distill_loss(checked, group)
    image, text, scale, t_image, t_text, t_scale, _ = checked()

    pairs = gaps(image, text, scale, None, options)
    lse = pairs.pos + symmetric_cross_entropy(pairs)
    own = torch.arange(len(image), device=image.device)
    with torch.no_grad():
        sums = ops.similarity_sums(t_image, t_text, t_scale, own, normalize, backend)
        teacher = t_image, t_text, t_scale, own, *sums[2:4], *teacher_weights(sums, len(image))
    agreed = agreement(unit_rows(image, normalize), unit_rows(text, normalize), teacher, normalize, backend)
    return (lse.mean() - scale * agreed).to(scale.dtype)
