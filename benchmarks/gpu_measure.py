"""How GPU time, memory and the matrix-product ceiling are measured. Times in milliseconds, by device events.

Without a GPU the same code runs on the processor, by the clock: that rehearses the benchmark, and measures nothing.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "triton" if DEVICE == "cuda" else "eager"  # fastclip's
CEILING_ROWS = 8192 if DEVICE == "cuda" else 256  # the product whose rate is the ceiling: this number cubed
SLOW_MS = 2000.0  # calls longer than this are timed once, the others three times at least


@dataclass(frozen=True)
class Batch:
    """image, text [N, D] of unit length, and scale: leaves that want gradients."""

    image: Tensor
    text: Tensor
    scale: Tensor


def batch(n: int, d: int, dtype: torch.dtype, *, scale: float, cosine: float) -> Batch:
    """Pairs of the given cosine, drawn on the device; all else is random."""
    draw = torch.Generator(DEVICE).manual_seed(0)

    def unit() -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n, d, generator=draw, device=DEVICE), dim=1)

    image = unit()
    text = cosine * image + (1 - cosine**2) ** 0.5 * unit()
    image, text = (t.to(dtype).requires_grad_() for t in (image, torch.nn.functional.normalize(text, dim=1)))
    return Batch(image, text, torch.tensor(scale, device=DEVICE, requires_grad=True))


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
    return stopwatch(call)()


def stopwatch(call: Callable[[], object]) -> Callable[[], float]:
    """Starts the call, waits for nothing; the result waits for its end and gives the milliseconds it took."""
    if DEVICE == "cpu":
        start_s = time.perf_counter()
        call()
        taken_ms = 1e3 * (time.perf_counter() - start_s)
        return lambda: taken_ms
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()

    def taken() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return taken


def interleaved(
    calls: dict[str, Call], estimates_ms: dict[str, float], budget_ms: float, most: int = 30
) -> dict[str, list[float]]:
    """Runs of every call in turn: A B C, then C B A, so that a drift falls on all alike.

    Each call gets about the same share of the budget, by its estimate: a slow one is in the first rounds alone, so that
    run i of any two calls is of the same round.
    """
    share_ms = budget_ms / len(calls)
    rounds = {
        name: min(most, max(3 if estimates_ms[name] < SLOW_MS else 1, int(share_ms / max(estimates_ms[name], 1e-3))))
        for name in calls
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(max(rounds.values())):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            if number < rounds[name]:
                times[name].append(milliseconds(calls[name]))
    return times


def peak_mib(call: Call) -> tuple[float, float]:
    """Peak device memory of one call above what was allocated before it, its results included; and its milliseconds."""
    if DEVICE == "cpu":
        return 0.0, milliseconds(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken_ms = milliseconds(call)
    return (torch.cuda.max_memory_allocated() - before) / 2**20, taken_ms


def free_mib() -> float:
    """Memory that is free, or was freed and is kept by torch's allocator."""
    if DEVICE == "cpu":
        return 1024.0
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return (torch.cuda.mem_get_info()[0] + kept) / 2**20


def give_back() -> None:
    """Returns what torch's allocator keeps to the device, after large or failed calls."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def ceiling(dtype: torch.dtype) -> Call:
    """A square matrix product on random data: 2 * CEILING_ROWS^3 FLOP."""
    a, b = (torch.randn(CEILING_ROWS, CEILING_ROWS, device=DEVICE, dtype=dtype) for _ in range(2))
    return lambda: (a @ b,)


def ceiling_tflops(dtype: torch.dtype, runs: int = 10) -> float:
    """Its rate, by itself."""
    call = ceiling(dtype)
    for _ in range(3):
        call()
    return tflops(2 * CEILING_ROWS**3, [milliseconds(call) for _ in range(runs)])


def logits_alone(data: Batch) -> Call:
    """x @ y.T by cuBLAS, stored: what the forward pass is compared with."""
    image, text = data.image.detach(), data.text.detach()
    return lambda: (image @ text.T,)


def tflops(flop: float, times_ms: list[float]) -> float:
    return flop / median(times_ms) / 1e9
