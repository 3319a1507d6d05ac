"""Distillation over the ranks of a group: each rank its students' rows against all columns, and its teacher's.

Legend: image, text [n_r, D] of this rank's student, its teacher's [n_r, E]; N pairs over all ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastclip import backends, ops
from fastclip.agreement import agreement, teacher_weights
from fastclip.distributed.exchange import all_rows, gather_rows, whole
from fastclip.distributed.gaps import gaps
from fastclip.distributed.positives import own_keys
from fastclip.distributed.ring_distill import Teacher, ring_agreement
from fastclip.distributed.scaled import Scaled
from fastclip.distributed.shards import Shards, agree, not_compiled, tensor_text
from fastclip.distributed.sums import similarity_sums
from fastclip.softmax import Options, symmetric_cross_entropy, unit_rows


@not_compiled
def distill_loss(check: Callable[[], tuple], group: object) -> Tensor:
    """fastclip.distill_loss over the ranks of `group`.

    check: validates this rank's arguments and returns image, text, scale, the teacher's three and the options.
    """
    (image, text, scale, *teacher, options), shards = agree(group, check, _describe)
    pairs, n = gaps(image, text, scale, own_keys(image, shards), options, None, None), sum(shards.rows)
    lse = pairs.pos + symmetric_cross_entropy(pairs)
    with torch.no_grad():
        teacher = _teacher(*teacher, shards, options)
    images, texts = unit_rows(image, options.normalize), unit_rows(text, options.normalize)
    if shards.mode == "ring":
        agreed = ring_agreement(images, texts, teacher, shards, options.normalize, options.backend)
    else:
        texts = all_rows(texts, shards.cols, shards.group)
        agreed = agreement(images, texts, _with_all_texts(teacher, shards), options.normalize, options.backend)
    return whole(lse.sum() / n - scale * agreed, shards.group).to(scale.dtype)


def _describe(checked: tuple) -> tuple[int, int, str]:
    image, text, scale, t_image, *_, options = checked
    backends.choose(image, options.backend or "")  # raises where it cannot run
    tensors = tensor_text(image=image, text=text, scale=scale)
    widths = f"D={image.shape[1]} E={t_image.shape[1]}"
    return len(image), len(text), f"distill_loss {widths} {tensors} {options}"


def _teacher(image: Tensor, text: Tensor, scale: Tensor, shards: Shards, options: Options) -> Teacher:
    """What makes this rank's rows of P, with the columns of all ranks."""
    column = shards.own_columns(image)
    sums = similarity_sums(image, text, scale, column, shards, options.normalize, options.backend, ops.NO_MASK)
    row_shift, col_shift = sums[2:4]
    a, b, d = teacher_weights(sums, sum(shards.rows))
    columns = gather_rows(torch.stack([b, col_shift], 1), shards.cols, shards.group)
    return Teacher(image, text, scale, column, Scaled(a, row_shift), Scaled(*columns.T.contiguous()), d)


def _with_all_texts(teacher: Teacher, shards: Shards) -> tuple:
    """`agreement`'s argument."""
    image, text, scale, column, (a, row_shift), (b, col_shift), d = teacher
    return image, gather_rows(text, shards.cols, shards.group), scale, column, row_shift, col_shift, a, b, d
