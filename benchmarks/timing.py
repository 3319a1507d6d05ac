"""Paired runs of one problem's peers, in a process of their own."""

from dataclasses import dataclass, field

from fastclip.benchmarks.case import Problem, Truth, errors
from fastclip.benchmarks.ceiling import Ceiling, bandwidth
from fastclip.benchmarks.measure import interleaved
from fastclip.benchmarks.memory import WARM_UP_ROWS


@dataclass(frozen=True)
class Schedule:
    """rounds: at least start, at most stop; between them until budget_s has passed. cold: peers whose calls are so long
    that they do not notice a cold start: these run a small problem first, the others the problem itself, which is then
    checked and not timed."""

    rounds: range
    budget_s: float
    cold: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rounds:
    """What one process measured.

    seconds: peer -> one a round. gflops: dtype -> library -> one a round, the fastest matrix products. gbytes: GB/s of
    a copy. error: peer -> case.errors of the warm-up call. failure: peer -> why it is left out, or is wrong.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    gflops: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    gbytes: float = 0.0
    error: dict[str, dict[str, float]] = field(default_factory=dict)
    failure: dict[str, str] = field(default_factory=dict)


def measure_rounds(
    names: list[str],
    problem: Problem,
    truth: Truth,
    yardstick: dict[str, float],
    schedule: Schedule,
    time_wrong: bool = False,
) -> Rounds:
    """To be run in a child. A peer whose warm-up fails or is wrong is not timed (a wrong one is, with time_wrong)."""
    from fastclip.benchmarks.cases import CASES

    case = CASES[problem.case]
    calls, error, failure = {}, {}, {}
    for name in names:
        try:
            call = case.peers[name].prepare(problem)
            if name in schedule.cold:
                case.peers[name].prepare(problem.of_size(WARM_UP_ROWS))()
            else:
                error[name] = errors(case.observe(call(), problem), truth)
        except (RuntimeError, MemoryError) as problem_with_it:
            failure[name] = f"{type(problem_with_it).__name__}: {(str(problem_with_it).splitlines() or [''])[0]}"
            continue
        wrong = case.complaint(error.get(name, {}), yardstick, problem.dtype)
        if wrong is not None:
            failure[name] = wrong
        if wrong is None or time_wrong:
            calls[name] = call

    has_floor = case.floor(problem)[0] > 0
    ceilings = {dtype: Ceiling(dtype, problem.d) for dtype in {problem.dtype, "fp32"}} if has_floor else {}
    gbytes = bandwidth() if has_floor else 0.0

    def between() -> None:
        for ceiling in ceilings.values():
            ceiling.sample()

    seconds = interleaved(calls, between, schedule.rounds, schedule.budget_s)
    gflops = {dtype: ceiling.rates for dtype, ceiling in ceilings.items()}
    return Rounds(seconds, gflops, gbytes, error, failure)
