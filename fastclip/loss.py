"""The loss functions: O(N) PyTorch around the operators that do the O(N^2 D) work.

Legend: image, text [N, D]; query [N, D], key [M, D]. Row i of S = scale * image^ text^T belongs to image i, column j to
text j. Equations: docs/math.md.
"""

import torch
from torch import Tensor

from fastclip import checks, distributed, ops, plain, sigmoid
from fastclip.softmax import (
    Gaps,
    LossStats,
    Options,
    cross_entropy,
    gap,
    gaps,
    has_soft_targets,
    log_add,
    reduce,
    soft_targets,
    symmetric_cross_entropy,
)


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
    false_negative_margin: float | None = None,
    hardness: float = 0.0,
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
        ids: [N] integers; equal ids are the same thing (the same caption, the same product).
        ids_mode: "positive": every match is a positive, the target is uniform over the matches (eq. 12);
            "ignore": a match other than the own pair is no negative (eq. 10).
        false_negative_margin: leave out negatives whose cosine exceeds the positive's by more than this (a constant
            choice, without a gradient; for a positive scale). None keeps all.
        hardness: negatives count exp(hardness * cosine) times, a constant factor (eq. 13). 0 is the plain loss.
        group: a ProcessGroup, or a `fastclip.distributed.Sharded`: the batch is spread over its ranks, each passes its
            own rows (as many as it has), weight and ids, and gets the whole batch's loss ("none": its own pairs').
            Gradients averaged over the ranks, as DDP and FSDP do, are the whole batch's (docs/distributed.md).
        backend: None takes the first of `available_backends()` that can run these tensors.
        return_stats: also return a LossStats.

    Returns:
        The loss, float32 (float64 for float64 features), 0-d or [N]; with return_stats, (loss, LossStats).

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or values that do not fit; the message says expected and got.
        RuntimeError: a backend asked for by name that cannot run here, with the reason.
    """

    def checked():
        checks.reduction(reduction)
        image, text = checks.features(image_features, text_features, "image_features", "text_features", paired=True)
        scale = checks.scalar(logit_scale, "logit_scale", image)
        pair_weight = checks.sample_weight(weight, len(image), image)
        pair_ids = None if ids is None else checks.integers(ids, "ids", len(image), image)
        options = Options(normalize, label_smoothing, ids_mode, false_negative_margin, hardness, backend)
        checks.options(options, ids is not None)
        return image, text, scale, pair_weight, pair_ids, options

    if group is not None:
        return distributed.clip_loss(checked, group, reduction, return_stats)
    image, text, scale, weight, ids, options = checked()

    has_options = label_smoothing or hardness or false_negative_margin is not None or ids is not None
    is_plain = not (has_options or return_stats or reduction == "none")
    if is_plain and plain.serves(image, weight, backend):
        return plain.clip_loss(image, text, scale, weight, reduction == "mean", normalize, backend)
    pairs = gaps(image, text, scale, None, options, ids, ids)
    losses = symmetric_cross_entropy(pairs)
    if has_soft_targets(options, ids):
        by_image = soft_targets(image, text, scale, pairs.pos, None, options, ids, ids)
        by_text = soft_targets(text, image, scale, pairs.pos, None, options, ids, ids)
        losses = losses + 0.5 * (by_image + by_text)
    loss = reduce(losses, weight, reduction, scale.dtype)
    return (loss, _stats(image, text, scale, None, options, pairs, losses)) if return_stats else loss


def info_nce(
    query: Tensor,
    key: Tensor,
    scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    symmetric: bool = False,
    query_negatives: bool = False,
    key_negatives: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    ids_mode: str = "positive",
    false_negative_margin: float | None = None,
    hardness: float = 0.0,
    group: object | None = None,
    backend: str | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """InfoNCE: each query against all keys, M >= N for extra negatives, without storing the N x M logits.

    Equals `cross_entropy(S, labels)` with `S = scale * normalize(query) @ normalize(key).T` (van den Oord et al. 2018);
    symmetric=True averages it with `cross_entropy(S[:, labels].T, arange(N))`: each positive key against all queries.

    Args:
        query [N, D], key [M, D], scale: as clip_loss's features and logit_scale.
        labels: [N] integers in [0, M), the positive key of each query; None: query i belongs to key i, and M >= N.
        query_negatives: the other queries join each query's negatives (query-query similarities).
        key_negatives: the other keys join the positive key's negatives: in the column's softmax with symmetric=True,
            else in the query's own. With both and symmetric=True this is NT-Xent (Chen et al. 2020).
        ids [N], key_ids [M]: as clip_loss's ids, for queries and keys; both or neither. Apply to query-key pairs.
        group: as in clip_loss; each rank passes its own queries and keys. labels then count the keys of all ranks in
            order, [0, M) with M their number: key j of rank r is label m_0 + ... + m_(r-1) + j for rank sizes m. None:
            query i belongs to key i of its own rank, which has at least as many keys.
        The other arguments are clip_loss's.

    Returns and raises as clip_loss; LossStats' "image" is the query, "text" its positive key.
    """

    def checked():
        checks.reduction(reduction)
        x, y = checks.features(query, key, "query", "key", paired=False)
        multiplier = checks.scalar(scale, "scale", x)
        query_weight = checks.sample_weight(weight, len(x), x)
        columns = None if labels is None else checks.integers(labels, "labels", len(x), x)
        if labels is not None and group is None:  # over ranks: once all keys are counted
            columns = checks.indices(labels, "labels", len(x), len(y), x)
        if labels is None and len(y) < len(x):
            raise ValueError(f"without labels key must hold at least N = {len(x)} rows, got {len(y)}")
        if (ids is None) != (key_ids is None):
            raise ValueError("ids and key_ids must both be given, or neither")
        x_ids = None if ids is None else checks.integers(ids, "ids", len(x), x)
        y_ids = None if key_ids is None else checks.integers(key_ids, "key_ids", len(y), x)
        options = Options(normalize, label_smoothing, ids_mode, false_negative_margin, hardness, backend)
        checks.options(options, ids is not None)
        return x, y, multiplier, columns, query_weight, x_ids, y_ids, options

    if group is not None:
        form = distributed.InfoNCEForm(symmetric, query_negatives, key_negatives, reduction, return_stats)
        return distributed.info_nce(checked, form, group)
    query, key, scale, labels, weight, ids, key_ids, options = checked()

    pairs = gaps(query, key, scale, labels, options, ids, key_ids)
    row_gap, col_gap = pairs.row_gap, pairs.col_gap
    if query_negatives:
        row_gap = log_add(row_gap, _own_side(query, scale, None, pairs.pos, options))
    if key_negatives:
        among_keys = _own_side(key, scale, labels, pairs.pos, options)
        row_gap, col_gap = (
            (row_gap, log_add(col_gap, among_keys)) if symmetric else (log_add(row_gap, among_keys), col_gap)
        )
    losses = cross_entropy(row_gap) + soft_targets(query, key, scale, pairs.pos, labels, options, ids, key_ids)
    if symmetric:
        at = slice(len(query)) if labels is None else labels
        own_key, own_id = key[at], None if key_ids is None else key_ids[at]
        targets = soft_targets(own_key, query, scale, pairs.pos, None, options, own_id, ids)
        losses = 0.5 * (losses + cross_entropy(col_gap) + targets)
    loss = reduce(losses, weight, reduction, scale.dtype)
    if not return_stats:
        return loss
    return loss, _stats(query, key, scale, labels, options, Gaps(row_gap, col_gap, pairs.pos), losses)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    ids_mode: str = "positive",
    group: object | None = None,
    backend: str | None = None,
) -> Tensor:
    """SigLIP's pairwise sigmoid loss over all N x N pairs, without storing them; value and gradients from one pass.

    Equals `-logsigmoid(z * (S + logit_bias)).sum() / N`, z = 1 on the diagonal and -1 elsewhere (Zhai et al. 2023;
    docs/math.md, eq. 11), in value and in the gradients of both features, the scale and the bias.

    Args:
        image_features, text_features, logit_scale, normalize, backend, group: as in clip_loss.
        logit_bias: a float, a 0-d or a [1] tensor, learnable or not; None is 0.
        reduction: "mean" (over N), "sum", or "none": one loss per image, the sum over its texts, [N]. "none" with
            gradients takes a second pass.
        weight: [N], one weight per image's row, a constant; "mean" divides by their sum.
        ids, ids_mode: as in clip_loss; "positive": z = 1 for every match; "ignore": other matches are left out.

    Returns the loss, float32 (float64 for float64 features), 0-d or [N]. Raises as clip_loss.
    """

    def checked():
        checks.reduction(reduction)
        checks.ids_mode(ids_mode)
        image, text = checks.features(image_features, text_features, "image_features", "text_features", paired=True)
        scale = checks.scalar(logit_scale, "logit_scale", image)
        bias = checks.scalar(0.0 if logit_bias is None else logit_bias, "logit_bias", image)
        pair_weight = checks.sample_weight(weight, len(image), image)
        pair_ids = None if ids is None else checks.integers(ids, "ids", len(image), image)
        return distributed.SigmoidInputs(image, text, scale, bias, pair_weight, pair_ids)

    if group is not None:
        return distributed.siglip_loss(
            checked, distributed.SigmoidOptions(normalize, backend, ids_mode), group, reduction
        )
    image, text, scale, bias, weight, ids = checked()

    mask = ops.NO_MASK if ids is None else ops.Mask(ids, ids)
    positive = torch.arange(len(image), device=image.device)
    args = (image, text, scale, bias, positive)
    rest = (normalize, backend, mask, ids_mode == "positive")
    ones = torch.ones_like(positive, dtype=scale.dtype)
    if reduction == "none":
        losses = sigmoid.sigmoid_row_losses(*args, ones, *rest)
        return losses if weight is None else losses * weight
    row_weight = ones if weight is None else weight
    if reduction == "mean":
        row_weight = row_weight / row_weight.sum()
    return sigmoid.sigmoid_loss(*args, row_weight.detach(), *rest)


def _own_side(x: Tensor, scale: Tensor, rows: Tensor | None, pos: Tensor, options: Options) -> Tensor:
    """[N]: log-sum of each row's similarities with the other rows of x, minus pos. rows: the key of each query."""
    own = torch.arange(len(x), device=x.device)
    sums = ops.similarity_sums(x, x, scale, own, options.normalize, options.backend)
    at = slice(len(pos)) if rows is None else rows
    return gap(sums[0][at], sums[2][at], pos)


def _stats(x, y, scale, labels, options: Options, pairs: Gaps, losses: Tensor) -> LossStats:
    pos = pairs.pos.detach()
    rows = torch.arange(len(x), device=x.device)
    cols = rows if labels is None else labels
    row_rank, col_rank = ops.similarity_ranks(x, y, scale, rows, cols, options.normalize, options.backend)
    row_rank, col_rank = row_rank.to(pos.dtype), col_rank[cols].to(pos.dtype)
    return LossStats(
        image_lse=(pos + cross_entropy(pairs.row_gap.detach())).to(pos.dtype),
        text_lse=(pos + cross_entropy(pairs.col_gap.detach())).to(pos.dtype),
        losses=losses.detach().to(pos.dtype),
        image_accuracy=(row_rank == 0).to(pos.dtype).mean(),
        text_accuracy=(col_rank == 0).to(pos.dtype).mean(),
        mean_rank=0.5 * (row_rank.mean() + col_rank.mean()),
    )
