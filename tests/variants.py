"""Random cases of every variant of the losses, each with its dense definition (fastclip/reference.py).

case("info_nce positive", seed) gives the loss and the definition as functions of the same inputs, so that a test can
compare the value and every gradient on any backend, in any dtype.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastclip
from fastclip import reference

KINDS = ("plain", "smoothing", "positive", "positive+smoothing", "ignore", "margin", "hardness")
VARIANTS = (
    *(f"info_nce {kind}" for kind in KINDS),
    *(f"clip {kind}" for kind in KINDS),
    *(f"siglip {kind}" for kind in ("plain", "positive", "ignore")),
    "distill",
)


@dataclass(frozen=True)
class Case:
    """fast(*inputs, backend=...) and dense(*inputs): losses [N] or 0-d. inputs: float64, to be differentiated by."""

    fast: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def case(variant: str, seed: int, rows: tuple[int, ...] = (1, 2, 5, 17, 60, 200)) -> Case:
    """rows: the batch sizes to choose from; from one pair to several tiles, ragged."""
    loss, _, kind = variant.partition(" ")
    rng = random.Random(f"{variant} {seed}")
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    n, d = rng.choice(rows), rng.choice([2, 5, 16, 33])
    m = n + rng.choice([0, 0, 3, 30]) if loss == "info_nce" else n
    query, key = (torch.randn(count, d, generator=generator, dtype=torch.float64) for count in (n, m))
    key[:n] += rng.choice([0.0, 1.0]) * query
    make = {"info_nce": info_nce, "clip": clip, "siglip": siglip, "distill": distill}[loss]
    return make(kind, query, key, rng, generator)


def info_nce(kind: str, query: Tensor, key: Tensor, rng: random.Random, generator: torch.Generator) -> Case:
    n, m = len(query), len(key)
    labels = rng.choice([None, torch.randperm(m, generator=generator)[:n]])
    if kind in ("plain", "ignore", "positive") and rng.random() < 0.3:  # several queries share a key
        labels = torch.randint(0, m, (n,), generator=generator)
    flags = ("symmetric", "query_negatives", "key_negatives", "normalize")
    options = {flag: rng.random() < 0.5 for flag in flags} | softmax_options(kind, m, generator)
    if "key_ids" in options:
        options["ids"] = options["key_ids"][torch.arange(n) if labels is None else labels]
    scale = torch.tensor(rng.choice([1.0, 5.0, 20.0]), dtype=torch.float64)
    return Case(
        lambda q, k, s, backend: fastclip.info_nce(
            q, k, s, labels=labels, reduction="none", backend=backend, **options
        ),
        lambda q, k, s: reference.info_nce(q, k, s, labels=labels, **options),
        (query, key, scale),
    )


def clip(kind: str, image: Tensor, text: Tensor, rng: random.Random, generator: torch.Generator) -> Case:
    """The symmetric info_nce with no extra key."""
    options = softmax_options(kind, len(image), generator) | {"normalize": rng.random() < 0.5}
    ids = options.pop("key_ids", None)
    single, both = ({}, {}) if ids is None else ({"ids": ids}, {"ids": ids, "key_ids": ids})
    scale = torch.tensor(rng.choice([1.0, 7.0, 20.0]), dtype=torch.float64)
    return Case(
        lambda x, y, s, backend: fastclip.clip_loss(x, y, s, reduction="none", backend=backend, **options, **single),
        lambda x, y, s: reference.info_nce(x, y, s, symmetric=True, **options, **both),
        (image, text, scale),
    )


def siglip(kind: str, image: Tensor, text: Tensor, rng: random.Random, generator: torch.Generator) -> Case:
    n, reduction = len(image), rng.choice(["none", "sum", "mean"])
    ids = torch.randint(0, max(1, n // 2), (n,), generator=generator)
    options = {"normalize": rng.random() < 0.5} | ({} if kind == "plain" else {"ids": ids, "ids_mode": kind})
    weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1

    def dense(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        losses = reference.siglip_loss(x, y, s, b, **options) * weight.to(x.dtype)
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / weight.to(x.dtype).sum()}[reduction]

    scale, bias = (torch.tensor(rng.choice(c), dtype=torch.float64) for c in ([1.0, 10.0], [-10.0, -5.0, 0.0]))
    return Case(
        lambda x, y, s, b, backend: fastclip.siglip_loss(
            x, y, s, b, weight=weight, reduction=reduction, backend=backend, **options
        ),
        dense,
        (image, text, scale, bias),
    )


def distill(kind: str, image: Tensor, text: Tensor, rng: random.Random, generator: torch.Generator) -> Case:
    normalize, teacher_scale = rng.random() < 0.5, rng.choice([1.0, 100.0])
    teacher = [torch.randn(len(image), 11, generator=generator, dtype=torch.float64) for _ in range(2)]

    def dense(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        target = reference.logits(*(t.to(x.dtype) for t in teacher), teacher_scale, normalize=normalize)
        return reference.distill_loss(reference.logits(x, y, s, normalize=normalize), target)

    return Case(
        lambda x, y, s, backend: fastclip.distill_loss(
            x, y, s, *(t.to(x.dtype) for t in teacher), teacher_scale, normalize=normalize, backend=backend
        ),
        dense,
        (image, text, torch.tensor(10.0, dtype=torch.float64)),
    )


def softmax_options(kind: str, keys: int, generator: torch.Generator) -> dict:
    options = {}
    if "smoothing" in kind:
        options["label_smoothing"] = 0.2
    if "positive" in kind or kind == "ignore":
        options["key_ids"] = torch.randint(0, max(1, keys // 2), (keys,), generator=generator)
        options["ids_mode"] = "ignore" if kind == "ignore" else "positive"
    if kind == "margin":
        options["false_negative_margin"] = 0.1
    if kind == "hardness":
        options["hardness"] = 3.0
    return options


def value_and_gradients(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """The value and each input's gradient, weighted by random numbers per pair, computed in dtype, as float64."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    value = loss(*inputs)
    upstream = torch.rand(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    grads = torch.autograd.grad((value * upstream.to(value.dtype)).sum(), inputs)
    return [tensor.detach().double() for tensor in (value, *grads)]
