"""Who computes the loss on a GPU: fastclip, and the forms of the same loss that people use instead.

Read for these calls: memeff 0.3.1, inf_cl 1.2.1, siglip-kernel 0.1.2, cut-cross-entropy 25.1.1, quack-kernels 0.6.5.

Legend: image, text [N, D] of unit length, scale 0-d float32; every loss is 0-d and equals
1/2 cross_entropy(S, arange(N)) + 1/2 cross_entropy(S.T, arange(N)) with S = scale * image text^T, but for those of
family "sigmoid", which equal SigLIP's with bias -10.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip import clip_loss, siglip_loss
from fastclip.benchmarks import peers
from fastclip.benchmarks.gpu_measure import BACKEND
from fastclip.benchmarks.problems import LOGIT_SCALE

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BIAS = -10.0
CHUNK_ROWS = 4096
CCE = {"dtypes": ("bf16",), "needs": "cut_cross_entropy", "package": "cut-cross-entropy"}
SIGLIP = {"needs": "siglip_kernel", "package": "siglip-kernel", "family": "sigmoid"}


class _Chunked(torch.autograd.Function):
    """cuBLAS-chunked PyTorch: log-sum-exps of row blocks, then their gradients from recomputed logits."""

    @staticmethod
    def forward(ctx, image, text, scale):
        n = len(image)
        row_lse = torch.empty(n, device=image.device)
        col_lse = torch.full((n,), -torch.inf, device=image.device)
        pos = torch.empty(n, device=image.device)
        for rows in _blocks(n):
            S = (image[rows] @ text.T).float() * scale
            row_lse[rows] = S.logsumexp(1)
            col_lse = torch.logaddexp(col_lse, S.logsumexp(0))
            pos[rows] = S[:, rows].diagonal()
        ctx.save_for_backward(image, text, scale, row_lse, col_lse)
        return (0.5 * (row_lse + col_lse) - pos).mean()

    @staticmethod
    def backward(ctx, upstream):
        image, text, scale, row_lse, col_lse = ctx.saved_tensors
        n = len(image)
        grad_image, grad_text = torch.empty_like(image), torch.zeros(text.shape, device=text.device)
        grad_scale = torch.zeros((), device=text.device)
        for rows in _blocks(n):
            cosine = (image[rows] @ text.T).float()
            S = cosine * scale
            G = 0.5 * ((S - row_lse[rows, None]).exp_() + (S - col_lse).exp_())
            G[:, rows].diagonal().sub_(1.0)
            G.mul_(upstream / n)
            grad_scale += (G * cosine).sum()
            G = G.mul_(scale).to(image.dtype)
            grad_image[rows] = G @ text
            grad_text += G.T @ image[rows]
        return grad_image, grad_text.to(text.dtype), grad_scale


def _blocks(n: int):
    return (slice(start, min(start + CHUNK_ROWS, n)) for start in range(0, n, CHUNK_ROWS))


def _memeff() -> Loss:
    from memeff.clip_loss import MemoryEfficientCLIPLoss

    # stable=False: the default's gradients are not the loss's. Its temperature is a float: no gradient for the scale.
    loss = MemoryEfficientCLIPLoss(temperature=1 / LOGIT_SCALE, normalized_inputs=True, stable=False)
    return lambda image, text, scale: loss(image, text)


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image, text, scale):
        return (cal_flash_loss(image, text, scale=scale) + cal_flash_loss(text, image, scale=scale)).mean() / 2

    return loss


def _cut_cross_entropy(**options: None) -> Loss:
    """Rows alone, so twice. By default it leaves gradients of small probabilities out; filter_eps=None keeps them."""
    from cut_cross_entropy import linear_cross_entropy

    return _both_ways(functools.partial(linear_cross_entropy, **options))


def _quack() -> Loss:
    """Rows alone, so twice; by itself it takes its Hopper pipeline where that can run."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _both_ways(chunked_linear_cross_entropy)


def _both_ways(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """CLIP's loss from two calls of a loss of rows; the scale goes into one operand, rounded to its dtype."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(image), device=image.device)
        rows, columns = ((scale * x).to(x.dtype) for x in (image, text))
        return (cross_entropy(rows, text, labels) + cross_entropy(columns, image, labels)) / 2

    return loss


def _siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    return lambda image, text, scale: fused_siglip_loss(image, text, scale.log(), torch.full_like(scale, BIAS))


@dataclass(frozen=True)
class GpuPeer:
    """matrices: N x N float32 matrices a training step holds. needs: a module that must be importable, from package."""

    name: str
    label: str
    build: Callable[[], Loss]
    matrices: float = 0.0
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    needs: str | None = None
    package: str | None = None
    family: str = "softmax"
    compiles: bool = False

    def why_not(self) -> str | None:
        """None where it can run here, else the reason, with the line that installs it."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed; pip install {self.package or self.needs}"
        if self.name == "linear-cross-entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f'it came with torch 2.13, this is {torch.__version__}; pip install "torch>=2.13"'
        return None


def _fastclip() -> Loss:
    return functools.partial(clip_loss, normalize=False, backend=BACKEND)


def _sigmoid(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return siglip_loss(image, text, scale, BIAS, normalize=False, backend=BACKEND)


# fastclip comes first in each family: above a size the others are compared with it (gpu_check.py).
GPU_PEERS = {
    peer.name: peer
    for peer in (
        GpuPeer("triton", "fastclip triton", _fastclip),
        GpuPeer("chunked", "cuBLAS-chunked PyTorch", lambda: _Chunked.apply),
        GpuPeer("dense", "dense, one matmul", lambda: peers.dense, matrices=4),
        GpuPeer("openclip", "OpenCLIP form, two matmuls", lambda: peers.open_clip, matrices=4),
        GpuPeer("compile", "torch.compile of dense", peers.compiled_dense, matrices=2.5, compiles=True),
        GpuPeer("linear-cross-entropy", "2 x linear_cross_entropy", lambda: peers.chunked),
        GpuPeer("memeff", "memeff", _memeff, needs="memeff"),
        GpuPeer("inf-cl", "Inf-CL", _inf_cl, needs="inf_cl"),
        GpuPeer("cce", "2 x cut-cross-entropy, exact", lambda: _cut_cross_entropy(filter_eps=None), **CCE),
        GpuPeer("cce-filtered", "2 x cut-cross-entropy, default", _cut_cross_entropy, **CCE),
        GpuPeer("quack", "2 x quack", _quack, dtypes=("bf16",), needs="quack", package="quack-kernels"),
        GpuPeer("sigmoid", "fastclip triton, sigmoid", lambda: _sigmoid, family="sigmoid"),
        GpuPeer("siglip-kernel", "siglip-kernel", _siglip_kernel, **SIGLIP),
    )
}
