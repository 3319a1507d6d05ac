"""The loss functions: O(N) PyTorch around the operator that does the O(N^2 D) work.

Legend: image, text [N, D]; row i of S = scale * image^ text^T belongs to image i, column j to text j.
row_gap_i = log sum of row i's negatives - its positive, so that softplus(row_gap_i) is its cross-entropy.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import checks, ops


@dataclass(frozen=True)
class LossStats:
    """By-products of one batch, detached. float32 (float64 for float64 features), natural log.

    image_lse, text_lse [N]: log-sum-exp of each image's row and each text's column of S.
    image_accuracy, text_accuracy 0-d in [0, 1]: share of images (texts) whose own text (image) no other one beats.
    mean_rank 0-d: how many candidates beat the positive, averaged over both directions; 0 is perfect.
    """

    image_lse: Tensor
    text_lse: Tensor
    image_accuracy: Tensor
    text_accuracy: Tensor
    mean_rank: Tensor


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    ids_mode: str = "positive",
    group: object | None = None,
    backend: str | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """CLIP's symmetric softmax loss over all N x N pairs of a batch, without storing the N x N logits.

    Equals `(cross_entropy(S, arange(N)) + cross_entropy(S.T, arange(N))) / 2` with
    `S = logit_scale * normalize(image_features) @ normalize(text_features).T` (Radford et al. 2021, figure 3;
    docs/math.md, eq. 3), in value and in the gradients of both features and of the scale.

    Args:
        image_features, text_features: [N, D], float16, bfloat16, float32 or float64, any strides, one device.
            Row i of one belongs to row i of the other. Under autocast both are cast to the autocast dtype.
        logit_scale: the multiplier itself (already exponentiated): a float, a 0-d or a [1] tensor.
        normalize: divide each row by its length first (F.normalize's eps). False takes the rows as they are.
        reduction: "mean", "sum" or "none" (one loss per pair, [N]).
        weight: [N], one weight per pair; "mean" divides by their sum.
        label_smoothing: in [0, 1], as in torch's cross_entropy.
        ids, ids_mode, group: not built yet; anything but None raises NotImplementedError.
        backend: None takes the first of `available_backends()` that can run these tensors.
        return_stats: also return a LossStats.

    Returns:
        The loss, float32 (float64 for float64 features), 0-d or [N]; with return_stats, (loss, LossStats).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit; the message says expected and got.
        RuntimeError: a backend asked for by name that cannot run here, with the reason.
    """
    if ids is not None:
        raise NotImplementedError("clip_loss(ids=...) is not built yet; leave ids=None")
    if group is not None:
        raise NotImplementedError("clip_loss(group=...) is not built yet; leave group=None and use one process")
    checks.reduction(reduction)
    eps = checks.smoothing(label_smoothing)
    image, text = checks.features(image_features, text_features, "image_features", "text_features", paired=True)
    scale = checks.scalar(logit_scale, "logit_scale", image)
    weight = checks.sample_weight(weight, len(image), image)

    positive = torch.arange(len(image), device=image.device)
    sums = ops.similarity_sums(image, text, scale, positive, normalize, backend)
    row_sum, col_sum, row_shift, col_shift, pos = sums
    row_gap = _log_sum(row_sum) + (row_shift - pos)
    col_gap = _log_sum(col_sum) + (col_shift - pos)
    losses = 0.5 * (_cross_entropy(row_gap) + _cross_entropy(col_gap))
    if eps:
        losses = losses + eps * (pos - scale * _mean_similarity(image, text, normalize))
    loss = _reduce(losses, weight, reduction)
    if not return_stats:
        return loss
    ranks = ops.similarity_ranks(image, text, scale, positive, positive, normalize, backend)
    return loss, _stats(row_gap.detach(), col_gap.detach(), pos.detach(), *ranks)


def _log_sum(total: Tensor) -> Tensor:
    """log(total), with -inf and a zero gradient where a pair has no negatives and total is exactly 0."""
    empty = total == 0
    return torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1.0, total)))


def _cross_entropy(gap: Tensor) -> Tensor:
    # log1p(exp(gap)) keeps its relative accuracy for a gap of -30 (math.md, eq. 4); torch's default threshold of 20
    # would drop the last 2e-9 in float64.
    return F.softplus(gap, threshold=50.0)


def _mean_similarity(image: Tensor, text: Tensor, normalize: bool) -> Tensor:
    """[N]: <image^_i, mean_j text^_j> averaged with <text^_i, mean_j image^_j> (math.md, eq. 5)."""
    dtype = checks.accumulation_dtype(image.dtype)
    image, text = image.to(dtype), text.to(dtype)
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    return 0.5 * (image @ text.mean(0) + text @ image.mean(0))


def _reduce(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if weight is None else losses.sum() / weight.sum()


def _stats(row_gap: Tensor, col_gap: Tensor, pos: Tensor, row_rank: Tensor, col_rank: Tensor) -> LossStats:
    return LossStats(
        image_lse=pos + _cross_entropy(row_gap),
        text_lse=pos + _cross_entropy(col_gap),
        image_accuracy=(row_rank == 0).to(pos.dtype).mean(),
        text_accuracy=(col_rank == 0).to(pos.dtype).mean(),
        mean_rank=0.5 * (row_rank.to(pos.dtype).mean() + col_rank.to(pos.dtype).mean()),
    )
