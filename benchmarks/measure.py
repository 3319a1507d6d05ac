"""How runs are ordered and summed up. Times in seconds of wall clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import mean, median, quantiles, stdev

from fastclip.benchmarks.case import Call

# 97.5th percentile of Student's t with k - 1 degrees of freedom, by the number k of processes; beyond 8 that of 8.
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


@dataclass(frozen=True)
class Spread:
    """Median of the runs of one thing, positive numbers, and the spread around it: their 10th and 90th percentiles or,
    at each end where that is wider, `confidence` in the processes' medians.

    processes: how many of the runs each process made, in order; empty where there was one. What a process, or a minute,
    changes does not average out with more rounds in it: two runs of the same program agree as their processes do.
    """

    median: float
    low: float
    high: float
    runs: list[float]
    processes: list[int] = field(default_factory=list)

    @staticmethod
    def of(runs: Sequence[float], processes: Sequence[int] = ()) -> Spread:
        ends = [0, *accumulate(processes or [len(runs)])]
        between = confidence([median(runs[start:end]) for start, end in pairwise(ends)])
        tenths = quantiles(runs, n=10, method="inclusive") if len(runs) > 1 else runs
        low, high = min(tenths[0], between[0]), max(tenths[-1], between[1])
        return Spread(median(runs), low, high, list(runs), list(processes))


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """95% confidence interval of the mean, by Student's t of the logarithms; the range of fewer than three values.

    Over processes as in Georges, Buytaert and Eeckhout, "Statistically rigorous Java performance evaluation" (2007).
    """
    if len(values) < 3:
        return min(values), max(values)
    logs = [math.log(value) for value in values]
    half = STUDENT[min(len(logs), max(STUDENT))] * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean(logs) - half), math.exp(mean(logs) + half)


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


def paired(over: Sequence[float], under: Sequence[float], processes: Sequence[int] = ()) -> Spread:
    """The quotient round by round."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)], processes)
