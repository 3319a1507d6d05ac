"""The float64 loss and gradients that every result is checked against, in bounded memory.

Legend: image, text [N, D]; C = image text^T cosines; S = scale C; P, Q the softmax of S over rows and columns.
The loss and the scale's gradient are complete; the features' gradients are taken on a random sample of rows, so that a
batch of 32768 costs one pass over S and not four. Plain formulas, nothing shared with fastclip's own code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.problems import Batch

SAMPLE = 1024  # rows of each gradient; all of them up to this N
CHUNK_ELEMENTS = 2**22  # elements of one chunk of S: 32 MiB in float64

# A relative error up to this is rounding, whatever the dense loss's own: float32 sums of many terms that cancel (a
# product rounded to TF32 or bf16 would leave 1e-3), or a few units in the last place of a 16-bit loss or gradient.
ROUNDING = {"fp32": 5e-5, "bf16": 2e-2, "fp16": 3e-3}
ALLOWED_RATIO = 4.0  # otherwise an error may be this many times the dense loss's in the same dtype
NEVER_ABOVE = {"fp32": 1e-2, "bf16": 0.2, "fp16": 5e-2}  # whatever the dense loss does


@dataclass(frozen=True)
class Truth:
    """loss and scale_grad 0-d; image_grad, text_grad [K, D] for the rows sample [K]. float64."""

    loss: Tensor
    scale_grad: Tensor
    sample: Tensor
    image_grad: Tensor
    text_grad: Tensor


def truth(batch: Batch, sample: int = SAMPLE) -> Truth:
    """Equals the dense symmetric cross-entropy and its autograd in float64, on `sample` rows of the gradients."""
    image, text, scale = (leaf.detach().double() for leaf in batch.leaves)
    n = len(image)
    row_lse, col_lse, scale_grad, pos = _sums(image, text, scale)
    loss = 0.5 * (row_lse.mean() + col_lse.mean()) - pos.mean()
    draw = torch.Generator().manual_seed(n)
    rows = torch.randperm(n, generator=draw)[:sample].sort().values.to(image.device)
    return Truth(
        loss=loss,
        scale_grad=scale_grad,
        sample=rows,
        image_grad=_feature_gradient(image, text, scale, row_lse, col_lse, rows),
        text_grad=_feature_gradient(text, image, scale, col_lse, row_lse, rows),
    )


def errors(found: tuple[Tensor, ...], expected: Truth) -> dict[str, float]:
    """Relative errors of (loss,) or (loss, image_grad, text_grad, scale_grad): |found - expected| / |expected|."""
    rows = expected.sample
    pairs = {"loss": (found[0], expected.loss)}
    if len(found) > 1:
        pairs["image_grad"] = (found[1][rows], expected.image_grad)
        pairs["text_grad"] = (found[2][rows], expected.text_grad)
        pairs["scale_grad"] = (found[3], expected.scale_grad)
    return {
        name: float((got.detach().double() - want).norm() / want.norm().clamp_min(1e-300))
        for name, (got, want) in pairs.items()
    }


def complaint(error: dict[str, float], dense_error: dict[str, float], dtype: str) -> str | None:
    """Why a result is wrong, in one sentence, or None: an error above ROUNDING and ALLOWED_RATIO x the dense loss's."""
    for name, value in error.items():
        limit = min(NEVER_ABOVE[dtype], max(ROUNDING[dtype], ALLOWED_RATIO * dense_error.get(name, 0.0)))
        if not value <= limit:
            return f"wrong {name}: relative error {value:.1e} against float64, at most {limit:.1e} allowed"
    return None


def _sums(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column log-sum-exps [N], the gradient of the scale, and the positives [N]."""
    n = len(image)
    # One shift is enough in float64, whose exponent reaches e^-700: |S| <= shift.
    shift = scale.abs() * image.norm(dim=1).max() * text.norm(dim=1).max()
    if shift > 300:
        raise ValueError(f"the reference takes logits up to 300, got a bound of {float(shift):.0f}")
    row_sum, row_dot, col_sum, col_dot = (image.new_zeros(n) for _ in range(4))
    for rows in _chunks(n, n):
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
    for chunk in _chunks(len(sample), len(y)):
        rows = sample[chunk]
        S = scale * (x[rows] @ y.T)
        G = torch.exp(S - x_lse[rows, None]) + torch.exp(S - y_lse)
        parts.append((G @ y - 2 * y[rows]) * (scale / (2 * len(x))))
    return torch.cat(parts)


def _chunks(rows: int, columns: int):
    step = max(1, CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
