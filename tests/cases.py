"""What the tests share: the backends at hand, inputs, and the dense loss that users would otherwise write.

Legend: image, text [N, D] features; S [N, N] logits.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import available_backends, backends, reference

BACKENDS = available_backends()
GPU_BACKENDS = ("triton", "cuda")

# csrc/cpu works on tiles of 6 rows, panels of 8, 16 or 64 columns (SSE, AVX2, AVX-512), blocks of 192, waves of 1920.
SIZES = {
    "one": 1,
    "two": 2,
    "tile-1": 5,
    "tile": 6,
    "tile+1": 7,
    "panel-1": 15,
    "panel": 16,
    "panel+1": 17,
    "wide-panel-1": 63,
    "wide-panel+1": 65,
    "ragged": 101,
    "block-1": 191,
    "block": 192,
    "block+1": 193,
}


def sizes(*names: str) -> dict:
    """Keyword arguments for pytest.mark.parametrize: sizes by name, the names as ids."""
    chosen = names or tuple(SIZES)
    return {"argvalues": [SIZES[name] for name in chosen], "ids": list(chosen)}


def device_of(backend: str) -> str:
    return "cuda" if backend in GPU_BACKENDS else "cpu"


def require(backend: str, x: Tensor) -> None:
    """Skips, with the backend's own reason, where it cannot run x (float64 on a backend that computes in float32)."""
    if backend not in available_backends(x):
        pytest.skip(f"{backend}: {backends._load(backend).why_not(x)}")


def features(n: int, d: int, backend: str = "cpu", dtype: torch.dtype = torch.float32, *, seed: int = 0, noise=1.0):
    """image [N, D] and a text [N, D] that resembles it, on the backend's device."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, d, generator=generator, dtype=torch.float64)
    text = image + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    image, text = (t.to(device_of(backend), dtype) for t in (image, text))
    require(backend, image)
    return image, text


def dense_loss(image: Tensor, text: Tensor, scale: Tensor | float, *, normalize: bool = True, **options) -> Tensor:
    """The loss as plain PyTorch writes it, in the features' own dtype; options are cross_entropy's."""
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    S = scale * (image @ text.T)
    labels = torch.arange(len(S), device=S.device)
    return (F.cross_entropy(S, labels, **options) + F.cross_entropy(S.T, labels, **options)) / 2


def value_and_grads(loss, image: Tensor, text: Tensor, scale: float, **options) -> list[Tensor]:
    """The loss and its gradients with respect to image, text and scale, as float64 on the CPU."""
    image, text = image.detach().clone().requires_grad_(), text.detach().clone().requires_grad_()
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    scale = torch.tensor(scale, dtype=dtype, device=image.device, requires_grad=True)
    value = loss(image, text, scale, **options)
    grads = torch.autograd.grad(value, (image, text, scale))
    return [t.detach().cpu().double() for t in (value, *grads)]


def truth(image: Tensor, text: Tensor, scale: float, **options) -> list[Tensor]:
    """value_and_grads of the reference in float64, for features already rounded to their dtype."""
    return value_and_grads(reference.clip_loss, image.cpu().double(), text.cpu().double(), scale, **options)


def assert_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype, *, ulps: float = 256) -> None:
    """Each tensor within `ulps` units in the last place of its own largest entry."""
    assert len(got) == len(want)
    for name, g, w in zip(("loss", "grad image", "grad text", "grad scale"), got, want, strict=False):
        limit = ulps * torch.finfo(dtype).eps * w.abs().max().item()
        torch.testing.assert_close(g, w, rtol=0.0, atol=limit + 1e-30, msg=lambda text, name=name: f"{name}: {text}")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """`code` in a fresh interpreter with these additional environment variables."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
