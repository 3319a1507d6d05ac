"""The case "siglip": SigLIP's sigmoid loss, forward and forward + backward.

Legend: image, text [N, D] of unit length; z = 1 on the diagonal, -1 elsewhere; every loss equals
-1/N sum_ij logsigmoid(z_ij (scale <image_i, text_j> + bias)).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import siglip_loss
from fastclip.benchmarks.case import DTYPES, TRAINING, Call, Case, Peer, Problem, Truth, by_name
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.foreign import open_clip_losses, why_not_open_clip
from fastclip.benchmarks.peers import why_not_backend
from fastclip.benchmarks.problems import batch, feature_mib, loss_call
from fastclip.benchmarks.truth import chunks, sample_rows

SCALE, BIAS = 10.0, -10.0  # SigLIP's initial values (Zhai et al. 2023)
QUICK, FULL = (2048,), (1024, 4096)


def dense(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One matrix of signs, one of logits; 16-bit logits go to float32 first, as under autocast."""
    S = ((scale * image) @ text.T).float() + bias
    z = 2 * torch.eye(len(image), device=image.device) - 1
    return -F.logsigmoid(z * S).sum() / len(image)


def open_clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """OpenCLIP's SigLipLoss itself."""
    return open_clip_losses().SigLipLoss()(image, text, scale, bias)


def fastclip_loss(backend: str):
    return functools.partial(siglip_loss, normalize=False, backend=backend)


def _call(loss, problem: Problem) -> Call:
    leaves = (*batch(problem, SCALE).leaves, torch.tensor(BIAS, requires_grad=True))
    return loss_call(loss, leaves, problem.mode)


class SiglipCase(Case):
    """Value and gradients of the sigmoid need one pass: its floor is lower than the softmax's."""

    name = "siglip"
    title = "SigLIP loss"
    reference = "dense"
    peers = by_name(
        Peer(
            "cpu",
            "fastclip cpu",
            lambda problem: _call(fastclip_loss("cpu"), problem),
            why_not=lambda: why_not_backend("cpu"),
        ),
        Peer("eager", "fastclip eager", lambda problem: _call(fastclip_loss("eager"), problem)),
        Peer("dense", "dense", lambda problem: _call(dense, problem), matrices=5),
        Peer(
            "openclip",
            "OpenCLIP's SigLipLoss",
            lambda problem: _call(open_clip, problem),
            matrices=5,
            dtypes=("fp32",),  # in 16 bits it sums N^2 terms in 16 bits: no result to compare
            why_not=why_not_open_clip,
        ),
    )

    def problems(self, config: Config) -> list[Problem]:
        return [
            Problem(self.name, n, config.d, dtype, mode)
            for n in sorted(config.sizes or (QUICK if config.quick else FULL))
            for dtype in config.dtypes
            for mode in config.modes
            if dtype == "fp32" or n <= config.largest_16_bit // 2
        ]

    def truth(self, problem: Problem) -> Truth:
        return _truth(problem.n, problem.d, problem.dtype, problem.seed)

    def floor(self, problem: Problem) -> tuple[float, float]:
        """FLOP: S once, and in training two products. Bytes: features read, their gradients written."""
        n, d, training = problem.n, problem.d, problem.mode == TRAINING
        features = 2 * n * d * DTYPES[problem.dtype].itemsize
        return (6 if training else 2) * n**2 * d, features * (3 if training else 1)

    def results_mib(self, problem: Problem) -> float:
        return 2 * feature_mib(problem) if problem.mode == TRAINING else 0.0


@functools.lru_cache(maxsize=1)
def _truth(n: int, d: int, dtype: str, seed: int) -> Truth:
    """In float64: loss and the gradients of scale and bias complete, those of the features on sampled rows."""
    leaves = batch(Problem("siglip", n, d, dtype, TRAINING, seed), SCALE).leaves
    image, text, scale = (leaf.detach().double() for leaf in leaves)
    loss = scale_grad = bias_grad = 0.0
    for rows in chunks(n, n):
        C = image[rows] @ text.T
        z = _signs(torch.arange(n)[rows], n)
        loss = loss - F.logsigmoid(z * (scale * C + BIAS)).sum() / n
        G = _slope(z, scale * C + BIAS) / n
        scale_grad, bias_grad = scale_grad + (G * C).sum(), bias_grad + G.sum()
    rows = sample_rows(n)
    features = {
        "image_grad": _feature_gradient(image, text, scale, rows),
        "text_grad": _feature_gradient(text, image, scale, rows),
    }
    values = {"loss": loss, **features, "scale_grad": scale_grad, "bias_grad": bias_grad}
    return Truth(values, rows=dict.fromkeys(features, rows))


def _signs(rows: Tensor, n: int) -> Tensor:
    """[K, N] rows of z."""
    z = torch.full((len(rows), n), -1.0, dtype=torch.float64)
    z[torch.arange(len(rows)), rows] = 1.0
    return z


def _slope(z: Tensor, S: Tensor) -> Tensor:
    """d(-logsigmoid(z S)) / dS."""
    return -z * torch.sigmoid(-z * S)


def _feature_gradient(x: Tensor, y: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    parts = []
    for part in chunks(len(rows), len(y)):
        chosen = rows[part]
        parts.append(scale / len(x) * _slope(_signs(chosen, len(y)), scale * (x[chosen] @ y.T) + BIAS) @ y)
    return torch.cat(parts)
