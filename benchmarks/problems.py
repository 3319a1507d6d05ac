"""Batches of unit-length features for the losses.

Legend: N pairs, D embedding width; image, text [N, D]; S = scale * image text^T, the N x N logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.benchmarks.case import DTYPES, TRAINING, Call, Problem

LOGIT_SCALE = 100.0  # where CLIP's learned scale ends up, and the hardest on rounding
# Of a pair: at that scale it keeps the loss at a few nats, and the scale's gradient away from zero, where any rounding
# would be a large relative error.
POSITIVE_COSINE = 0.15


@dataclass(frozen=True)
class Batch:
    """image, text [N, D] of unit length and scale, 0-d float32: leaves that want gradients."""

    image: Tensor
    text: Tensor
    scale: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.text, self.scale


def batch(problem: Problem, scale: float = LOGIT_SCALE) -> Batch:
    """Pairs with cosine POSITIVE_COSINE; all else is random."""
    draw = torch.Generator().manual_seed(problem.seed)
    image = F.normalize(torch.randn(problem.n, problem.d, generator=draw), dim=1)
    noise = F.normalize(torch.randn(problem.n, problem.d, generator=draw), dim=1)
    text = F.normalize(POSITIVE_COSINE * image + (1 - POSITIVE_COSINE**2) ** 0.5 * noise, dim=1)
    image, text = (x.to(DTYPES[problem.dtype]).requires_grad_() for x in (image, text))
    return Batch(image, text, torch.tensor(scale, requires_grad=True))


def feature_mib(problem: Problem) -> float:
    """Size of one side's features, or of their gradient, in MiB."""
    return problem.n * problem.d * DTYPES[problem.dtype].itemsize / 2**20


def loss_call(loss, leaves: tuple[Tensor, ...], mode: str) -> Call:
    """One evaluation of loss(*leaves) without a graph, or one training step: the loss and the leaves' gradients.

    leaves: image, text, scale and, for the sigmoid, bias. A leaf that the loss does not differentiate is left out.
    """
    names = ("image_grad", "text_grad", "scale_grad", "bias_grad")

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"loss": loss(*leaves)}

    def training() -> dict[str, Tensor]:
        value = loss(*leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        found = {name: grad for name, grad in zip(names, grads, strict=False) if grad is not None}
        return {"loss": value.detach(), **found}

    return training if mode == TRAINING else forward
