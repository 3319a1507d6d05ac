"""Whether a result is right, before it is timed.

Up to CHUNKED_ROWS the truth is fastclip's eager backend in float64. Above it, fastclip's log-sum-exps and gradients of
sampled rows and columns beside float64, its loss beside its log-sum-exps, and its scale's gradient beside its image's;
the other peers are then compared with fastclip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import clip_loss, siglip_loss
from fastclip.benchmarks.gpu_measure import BACKEND, Batch
from fastclip.benchmarks.gpu_peers import BIAS

CHUNKED_ROWS = 32768
SAMPLE = 64
CHUNK = 2**16
# Of fastclip. Others may be this far off and are timed all the same, with their error beside the time: a loss that
# rounds its logits to bf16 is a few percent off at scale 100.
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 0.01}
PEERS_TOLERANCE = 0.15


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
    return _worst(
        ((f.double() - e.double()).norm() / e.double().norm()).item()
        for f, e in zip(found, expected, strict=True)
        if f is not None
    )


def sampled_error(data: Batch, found: tuple[Tensor, ...]) -> float:
    """The largest relative error of what is checked of fastclip's own result on a large batch."""
    image, text, scale = data.image.detach(), data.text.detach(), data.scale.detach().double()
    _, stats = clip_loss(image, text, scale.float(), normalize=False, backend=BACKEND, return_stats=True)
    image_lse, text_lse = stats.image_lse.double(), stats.text_lse.double()
    positive = scale * torch.cat([(a.double() * b.double()).sum(1) for a, b in _chunks(image, text)])
    loss = (0.5 * (image_lse + text_lse) - positive).mean()
    errors = [(found[0].double() - loss).abs() / loss.abs()]
    sampled = torch.randperm(len(image), device=image.device)[:SAMPLE]
    sides = ((image, text, image_lse, text_lse), (text, image, text_lse, image_lse))
    for number, (own, other, own_lse, other_lse) in enumerate(sides, start=1):
        S = scale * _products(own[sampled], other)
        errors.append((own_lse[sampled] - S.logsumexp(1)).abs().max() / scale)
        if len(found) > 1:
            want = _gradient(S, other, other_lse, sampled) * scale / len(own)
            errors.append((found[number][sampled].double() - want).norm() / want.norm())
    if len(found) > 1:
        # The loss depends on scale * image alone, so the two gradients give the same derivative by log(scale).
        along_image = sum((a.double() * b.double()).sum() for a, b in _chunks(image, found[1]))
        errors.append((scale * found[3].double() - along_image).abs() / along_image.abs().clamp(min=1.0))
    return _worst(error.item() for error in errors)


def _gradient(S: Tensor, other: Tensor, other_lse: Tensor, rows: Tensor) -> Tensor:
    """N / scale times the gradient of sampled rows [SAMPLE, D]; S [SAMPLE, N] are their logits."""
    P = 0.5 * (torch.softmax(S, 1) + torch.exp(S - other_lse))
    P[torch.arange(len(rows), device=rows.device), rows] -= 1.0
    return sum(p @ t.double() for p, t in zip(P.split(CHUNK, 1), other.split(CHUNK), strict=True))


def _products(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a.double(), chunk.double()) for chunk in b.split(CHUNK)], dim=1)


def _chunks(a: Tensor, b: Tensor):
    return zip(a.split(CHUNK), b.split(CHUNK), strict=True)


def _worst(errors) -> float:
    """The largest; NaN if one is."""
    errors = list(errors)
    return float("nan") if any(error != error for error in errors) else max(errors)
