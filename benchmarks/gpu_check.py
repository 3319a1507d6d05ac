"""Whether a result is right, before it is timed.

Up to CHUNKED_ROWS the truth is fastclip's eager backend in float64. Above it, sampled rows: their log-sum-exps and
gradients in float64 beside fastclip's; the other peers are then compared with fastclip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import clip_loss, siglip_loss
from fastclip.benchmarks.gpu_measure import Batch
from fastclip.benchmarks.gpu_peers import BIAS

CHUNKED_ROWS = 32768
SAMPLE = 64
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 0.01}


def truth(data: Batch, family: str, training: bool) -> tuple[Tensor, ...]:
    """(loss,) or (loss, gradients of image, text and scale) in float64."""
    leaves = [t.detach().double().requires_grad_(training) for t in (data.image, data.text, data.scale)]
    if family == "softmax":
        value = clip_loss(*leaves, normalize=False, backend="eager")
    else:
        value = siglip_loss(*leaves, BIAS, normalize=False, backend="eager")
    return (value.detach(), *(torch.autograd.grad(value, leaves) if training else ()))


def worst_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error (2-norm) among the tensors; those a peer does not compute are left out."""
    errors = [
        ((f.double() - e.double()).norm() / e.double().norm()).item()
        for f, e in zip(found, expected, strict=True)
        if f is not None
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def sampled_error(data: Batch, found: tuple[Tensor, ...]) -> float:
    """The largest relative error of SAMPLE rows' log-sum-exps, and of their image gradients where there are any."""
    image, text, scale = data.image.detach(), data.text.detach(), data.scale.detach().double()
    n = len(image)
    rows = torch.randperm(n, device=image.device)[:SAMPLE]
    _, stats = clip_loss(image, text, scale.float(), normalize=False, backend="triton", return_stats=True)
    S = _products(image[rows], text) * scale
    errors = [(stats.image_lse[rows] - S.logsumexp(1)).abs().max() / scale]
    S_columns = _products(text[rows], image) * scale
    errors.append((stats.text_lse[rows] - S_columns.logsumexp(1)).abs().max() / scale)
    if len(found) > 1:
        P = 0.5 * (torch.softmax(S, 1) + torch.exp(S - stats.text_lse.double()))
        P[torch.arange(SAMPLE, device=rows.device), rows] -= 1.0
        want = scale / n * sum(p @ t.double() for p, t in zip(P.split(2**16, 1), text.split(2**16), strict=True))
        errors.append((found[1][rows].double() - want).norm() / want.norm())
    return max(error.item() for error in errors)


def _products(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a.double(), chunk.double()) for chunk in b.split(2**16)], dim=1)
