"""How runs are ordered and summed up. Times in seconds of wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from fastclip.benchmarks.case import Call


@dataclass(frozen=True)
class Spread:
    """Median of the runs of one thing and the spread around it: their 10th and 90th percentiles.

    Percentiles and not an error of the median: runs in one process are not independent of each other, and what a
    process changes (where its memory lies) does not average out with more rounds in it.
    """

    median: float
    low: float
    high: float
    runs: list[float]

    @staticmethod
    def of(runs: Sequence[float]) -> Spread:
        if len(runs) == 1:
            return Spread(runs[0], runs[0], runs[0], list(runs))
        tenths = quantiles(runs, n=10, method="inclusive")
        return Spread(median(runs), tenths[0], tenths[-1], list(runs))


def seconds(call: Callable[[], object]) -> tuple[float, object]:
    """Time of one call and what it returned."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def interleaved(calls: dict[str, Call], between: Callable[[], None], rounds: range, budget_s: float) -> dict:
    """Runs of every call in turn: A B C, then C B A, so that a drift of the machine falls on all alike.

    At least rounds.start rounds; then until budget_s has passed or there are rounds.stop. `between` runs before each
    round. Returns name -> list of seconds, one a round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(rounds.stop):
        if number >= rounds.start and time.perf_counter() - start > budget_s:
            break
        between()
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            times[name].append(seconds(calls[name])[0])
    return times


def paired(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The quotient round by round."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])
