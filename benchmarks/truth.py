"""The CLIP loss and its gradients in float64 and in bounded memory: what every result is checked against.

Legend: image, text [N, D]; C = image text^T cosines; S = scale C; P, Q the softmax of S over rows and columns.
The loss and the scale's gradient are complete; the features' gradients are taken on a random sample of rows, so that a
batch of 32768 costs one pass over S and not four. Plain formulas, nothing shared with fastclip's own code.
"""

import torch
from torch import Tensor

from fastclip.benchmarks.case import Truth
from fastclip.benchmarks.problems import Batch

SAMPLE = 1024  # rows of each gradient; all of them up to this N
CHUNK_ELEMENTS = 2**22  # elements of one chunk of S: 32 MiB in float64


def truth(batch: Batch, sample: int = SAMPLE) -> Truth:
    """Equals the dense symmetric cross-entropy and its autograd in float64, on `sample` rows of the gradients."""
    image, text, scale = (leaf.detach().double() for leaf in batch.leaves)
    row_lse, col_lse, scale_grad, pos = _sums(image, text, scale)
    rows = sample_rows(len(image), sample).to(image.device)
    return Truth(
        values={
            "loss": 0.5 * (row_lse.mean() + col_lse.mean()) - pos.mean(),
            "image_grad": _feature_gradient(image, text, scale, row_lse, col_lse, rows),
            "text_grad": _feature_gradient(text, image, scale, col_lse, row_lse, rows),
            "scale_grad": scale_grad,
        },
        rows={"image_grad": rows, "text_grad": rows},
    )


def sample_rows(n: int, sample: int = SAMPLE) -> Tensor:
    """[K] int64, sorted: the rows of a gradient that are compared, all of them where N is no larger than `sample`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))[:sample].sort().values


def chunks(rows: int, columns: int) -> list[slice]:
    """Slices of the rows of a rows x columns matrix, each of at most CHUNK_ELEMENTS elements."""
    step = max(1, CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _sums(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column log-sum-exps [N], the gradient of the scale, and the positives [N]."""
    n = len(image)
    # One shift is enough in float64, whose exponent reaches e^-700: |S| <= shift.
    shift = scale.abs() * image.norm(dim=1).max() * text.norm(dim=1).max()
    if shift > 300:
        raise ValueError(f"the reference takes logits up to 300, got a bound of {float(shift):.0f}")
    row_sum, row_dot, col_sum, col_dot = (image.new_zeros(n) for _ in range(4))
    for rows in chunks(n, n):
        C = image[rows] @ text.T
        E = torch.exp(scale * C - shift)
        row_sum[rows] = E.sum(1)
        col_sum += E.sum(0)
        E *= C
        row_dot[rows] = E.sum(1)
        col_dot += E.sum(0)
    cosine = (image * text).sum(1)
    # d loss / d scale = 1/2N sum_ij (P + Q - 2 I)_ij C_ij
    scale_grad = 0.5 * ((row_dot / row_sum).mean() + (col_dot / col_sum).mean()) - cosine.mean()
    return row_sum.log() + shift, col_sum.log() + shift, scale_grad, scale * cosine


def _feature_gradient(x: Tensor, y: Tensor, scale: Tensor, x_lse: Tensor, y_lse: Tensor, sample: Tensor) -> Tensor:
    """[K, D]: scale/2N ((P + Q) y - 2 y_positive) for the sampled rows of x."""
    parts = []
    for chunk in chunks(len(sample), len(y)):
        rows = sample[chunk]
        S = scale * (x[rows] @ y.T)
        G = torch.exp(S - x_lse[rows, None]) + torch.exp(S - y_lse)
        parts.append((G @ y - 2 * y[rows]) * (scale / (2 * len(x))))
    return torch.cat(parts)
