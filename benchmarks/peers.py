"""Who computes the CLIP loss: fastclip's backends and the forms of the same loss that people use instead.

Legend: image, text [N, D] of unit length, scale 0-d float32, labels [N]; every loss is 0-d and equals
1/2 cross_entropy(S, arange(N)) + 1/2 cross_entropy(S.T, arange(N)) with S = scale * image text^T.
"""

import functools
import os
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import backends, clip_loss
from fastclip.benchmarks.case import Call, Peer, Problem, by_name
from fastclip.benchmarks.problems import batch, loss_call

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """One matmul, both directions from the same logits; 16-bit logits go to float32 first, as under autocast."""
    labels = torch.arange(len(image), device=image.device)
    S = ((scale * image) @ text.T).float()
    return (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2


def dense_upcast(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The dense loss with features taken to float32 first: the better choice where 16-bit products are slow."""
    return dense(image.float(), text.float(), scale)


def open_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """OpenCLIP's ClipLoss on one process, from its formula: a matmul for each direction."""
    labels = torch.arange(len(image), device=image.device)
    logits_per_image = (scale * image @ text.T).float()
    logits_per_text = (scale * text @ image.T).float()
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def chunked(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Two calls of torch's chunked F.linear_cross_entropy with its automatic options, one for each direction."""
    labels = torch.arange(len(image), device=image.device)
    cross_entropy = functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    return (cross_entropy(scale * image, text, labels) + cross_entropy(scale * text, image, labels)) / 2


def compiled_dense() -> Loss:
    """torch.compile of the dense loss, for one shape; what was compiled before is dropped (torch keeps only 8)."""
    torch.compiler.reset()
    return torch.compile(dense, fullgraph=True, dynamic=False)


def fastclip_loss(backend: str) -> Loss:
    return functools.partial(clip_loss, normalize=False, backend=backend)


def prepared(build: Callable[[], Loss]) -> Callable[[Problem], Call]:
    """Peer.prepare of a loss of image, text and scale."""
    return lambda problem: loss_call(build(), batch(problem).leaves, problem.mode)


def why_not_backend(name: str) -> str | None:
    if name in backends.available_backends():
        return None
    return f"the {name} backend cannot run here (fastclip env says why); pip install --no-build-isolation ."


def _why_not_chunked() -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f'it came with torch 2.13, this is {torch.__version__}; pip install "torch>=2.13"'


def _why_not_compiled() -> str | None:
    if os.environ.get("CXX") or any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return None
    return "torch.compile needs a C++ compiler; apt install g++"


PEERS = by_name(
    Peer(
        "cpu",
        "fastclip cpu",
        prepared(lambda: fastclip_loss("cpu")),
        why_not=lambda: why_not_backend("cpu"),
    ),
    Peer("eager", "fastclip eager", prepared(lambda: fastclip_loss("eager"))),
    Peer("dense", "dense, one matmul", prepared(lambda: dense), matrices=4),
    Peer("dense-fp32", "dense, cast to fp32", prepared(lambda: dense_upcast), matrices=4, dtypes=("bf16", "fp16")),
    Peer("openclip", "OpenCLIP form, two matmuls", prepared(lambda: open_clip), matrices=4),
    Peer(
        "compile",
        "torch.compile of dense",
        prepared(compiled_dense),
        matrices=2,
        why_not=_why_not_compiled,
        compiles=True,
    ),
    Peer("chunked", "2 x linear_cross_entropy", prepared(lambda: chunked), why_not=_why_not_chunked),
)
