"""How a call is made, checked and timed. Times in seconds of wall clock."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.peers import Loss
from benchmarks.problems import TRAINING, Batch

Call = Callable[[], tuple[Tensor, ...]]


def make_call(loss: Loss, batch: Batch, mode: str) -> Call:
    """One evaluation without a graph -> (loss,), or one training step -> (loss, image_grad, text_grad, scale_grad)."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(*batch.leaves),)

    def training() -> tuple[Tensor, ...]:
        value = loss(*batch.leaves)
        return value.detach(), *torch.autograd.grad(value, batch.leaves)

    return training if mode == TRAINING else forward


def seconds(call: Call) -> tuple[float, tuple[Tensor, ...]]:
    """Time of one call and what it returned."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


@dataclass(frozen=True)
class Spread:
    """Median and whole range of a few runs of one thing."""

    median: float
    low: float
    high: float
    runs: list[float]

    @staticmethod
    def of(runs: Sequence[float]) -> "Spread":
        return Spread(median(runs), min(runs), max(runs), list(runs))


def interleaved(calls: dict[str, Call], between: Callable[[], None], rounds: range, budget_s: float) -> dict:
    """Runs of every call in turn: A B C, then C B A, so that a drift of the machine falls on all alike.

    At least rounds.start rounds; then until budget_s has passed or there are rounds.stop. `between` runs before each
    call. Returns name -> list of seconds, one a round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(rounds.stop):
        if number >= rounds.start and time.perf_counter() - start > budget_s:
            break
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            between()
            times[name].append(seconds(calls[name])[0])
    return times


def paired_ratio(other: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times as long `other` took as `base` in the same round."""
    return Spread.of([a / b for a, b in zip(other, base, strict=True)])
