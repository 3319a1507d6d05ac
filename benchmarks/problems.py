"""What is computed: batches of unit-length features, and the arithmetic that a loss over them cannot avoid.

Legend: N pairs, D embedding width; image, text [N, D]; S = scale * image text^T, the N x N logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, TRAINING = "forward", "forward+backward"
MODES = (FORWARD, TRAINING)

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


@dataclass(frozen=True)
class Problem:
    """One batch, reproducible from these numbers in any process. dtype: a key of DTYPES, the features' dtype."""

    n: int
    d: int
    dtype: str
    seed: int = 0

    def batch(self, device: str = "cpu") -> Batch:
        """Pairs with cosine POSITIVE_COSINE; all else is random. Drawn on the CPU, so the same on every device."""
        draw = torch.Generator().manual_seed(self.seed)
        image = F.normalize(torch.randn(self.n, self.d, generator=draw), dim=1)
        noise = F.normalize(torch.randn(self.n, self.d, generator=draw), dim=1)
        text = F.normalize(POSITIVE_COSINE * image + (1 - POSITIVE_COSINE**2) ** 0.5 * noise, dim=1)
        image, text = (x.to(device, DTYPES[self.dtype]).requires_grad_() for x in (image, text))
        return Batch(image, text, torch.tensor(LOGIT_SCALE, device=device, requires_grad=True))

    def flop(self, mode: str) -> int:
        """The least a loss without the N x N matrix can do: S once forward; S again and two products backward."""
        return (8 if mode == TRAINING else 2) * self.n**2 * self.d

    def gradient_mib(self) -> float:
        """Size of the two feature gradients in MiB."""
        return 2 * self.n * self.d * DTYPES[self.dtype].itemsize / 2**20
