"""How GPU time, memory and the matrix-product ceiling are measured. Times in milliseconds, by device events."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]
CEILING_ROWS = 8192  # the product whose rate is the ceiling: 8192 x 8192 x 8192


@dataclass(frozen=True)
class Batch:
    """image, text [N, D] of unit length, and scale: leaves that want gradients."""

    image: Tensor
    text: Tensor
    scale: Tensor


def batch(n: int, d: int, dtype: torch.dtype, *, scale: float, cosine: float) -> Batch:
    """Pairs of the given cosine, drawn on the GPU; all else is random."""
    draw = torch.Generator("cuda").manual_seed(0)

    def unit() -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n, d, generator=draw, device="cuda"), dim=1)

    image = unit()
    text = cosine * image + (1 - cosine**2) ** 0.5 * unit()
    image, text = (t.to(dtype).requires_grad_() for t in (image, torch.nn.functional.normalize(text, dim=1)))
    return Batch(image, text, torch.tensor(scale, device="cuda", requires_grad=True))


def make_call(loss, data: Batch, training: bool) -> Call:
    """One evaluation without a graph -> (loss,), or one training step -> (loss, grads of image, text and scale)."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(data.image, data.text, data.scale),)

    def step() -> tuple[Tensor, ...]:
        value = loss(data.image, data.text, data.scale)
        leaves = (data.image, data.text, data.scale)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        return value.detach(), *grads

    return step if training else forward


def milliseconds(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(calls: dict[str, Call], budget_ms: float, most: int = 30) -> dict[str, list[float]]:
    """Runs of every call in turn: A B C, then C B A, so that a drift falls on all alike; at least three rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    for number in range(most):
        if number >= 3 and spent > budget_ms:
            break
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            times[name].append(milliseconds(calls[name]))
            spent += times[name][-1]
    return times


def peak_mib(call: Call) -> float:
    """Peak device memory of one call above what was allocated before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceiling(dtype: torch.dtype) -> Call:
    """A square matrix product on random data: 2 * CEILING_ROWS^3 FLOP."""
    a, b = (torch.randn(CEILING_ROWS, CEILING_ROWS, device="cuda", dtype=dtype) for _ in range(2))
    return lambda: (a @ b,)


def logits_alone(data: Batch) -> Call:
    """x @ y.T by cuBLAS, stored: what the forward pass is compared with."""
    image, text = data.image.detach(), data.text.detach()
    return lambda: (image @ text.T,)


def tflops(flop: float, times_ms: list[float]) -> float:
    return flop / median(times_ms) / 1e9
