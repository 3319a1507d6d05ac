"""In which order it is measured. For every problem: who can run; peak memory and correctness of each, in a process of
its own; paired runs of all that passed, in another one. Then paired runs of every problem in a second process, a third,
and so on: a problem's processes are spread over the whole run, so that a slow minute of the machine is one of several.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median

from fastclip.benchmarks import memory
from fastclip.benchmarks.case import Case, Peer, Problem, Truth, errors
from fastclip.benchmarks.cases import CASES
from fastclip.benchmarks.children import ChildError, run_in_child
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.measure import Spread, paired
from fastclip.benchmarks.results import Results, Row
from fastclip.benchmarks.timing import Rounds, Schedule, measure_rounds

HOPELESS = 12  # a peer this many times slower than the fastest is followed up to calls of HOPELESS_S only
HOPELESS_S = 2.0
COLD_IS_WARM_S = 0.4  # a call this long does not notice a cold start
CHILD_COUNTS_S = 4.0  # where all are this long, the calls that measured memory are a round too
LONG_ROUND_S = 40.0  # a round this long is made once more, and that is all
ROUNDS = range(2, 12)  # of each process: A B C, C B A, and more while there is time
PATIENCE = 7  # times --group-s that the least rounds of all processes may take
FEWEST = 3  # processes, where rounds are so slow that this is exceeded
YARDSTICK_ROWS = 1024


@dataclass
class Group:
    """A problem on its way: its rows in the case's order, those to be timed, and what each process has measured."""

    case: Case
    problem: Problem
    rows: list[Row]
    timed: list[Row] = field(default_factory=list)
    truth: Truth | None = None
    yardstick: dict[str, float] = field(default_factory=dict)
    processes: int = 0
    schedule: Schedule | None = None
    measured: list[Rounds] = field(default_factory=list)


class Runner:
    """One run of the suite. `tell` is called with what is being done, `finished` with each problem's rows.

    earlier: what another run measured here, from which it is known how long calls take.
    """

    def __init__(
        self, config: Config, results: Results, tell: Callable[[str], None], earlier: Results | None = None
    ) -> None:
        self.config, self.results, self.tell, self.earlier = config, results, tell, earlier
        self.limit_mib = config.memory_limit_gib * 1024 if config.memory_limit_gib else 0.8 * memory.available_mib()
        self.yardsticks: dict[tuple[str, str], dict[str, float]] = {}
        self.problems = [
            problem for case in CASES.values() if config.wants(case.name) for problem in case.problems(config)
        ]

    def steps(self) -> int:
        """How often `tell` will be called, at most."""
        return sum(len(self._wanted(CASES[problem.case], problem)) + self.config.processes for problem in self.problems)

    def run(self, finished: Callable[[list[Row]], None], kept: Callable[[], None] = lambda: None) -> None:
        """kept is called when the results have grown by another process's."""
        for group in self._measure(self.problems):
            kept()
            if len(group.measured) >= group.processes:
                finished(group.rows)

    def again(self, problems: list[Problem]) -> None:
        """Measures these problems anew, in place of what the results have."""
        for _ in self._measure(problems):
            pass

    def _measure(self, problems: Iterable[Problem]) -> Iterator[Group]:
        """Yields a problem's group, its rows up to date, after each of its processes."""
        groups = []
        for problem in problems:
            group = self._begin(CASES[problem.case], problem)
            groups.append(group)
            if group.timed:
                self._next_process(group)
            self.results.add(group.rows)
            yield group
        while groups := [group for group in groups if len(group.measured) < group.processes]:
            for group in groups:
                self._next_process(group)
                yield group

    def _wanted(self, case: Case, problem: Problem) -> list[Peer]:
        """The plain form first: its error is the yardstick for the others."""
        peers = [peer for peer in case.peers.values() if case.wants(peer, problem, self.config)]
        return sorted(peers, key=lambda peer: peer.name != case.reference)

    def _begin(self, case: Case, problem: Problem) -> Group:
        """Who can run, and of these who passes; how the paired runs are to be."""
        rows, truth, passed = {}, None, []
        for peer in self._wanted(case, problem):
            self.tell(f"{problem}: {peer.label}")
            row = Row(case.name, peer.name, peer.label, problem.n, problem.d, problem.dtype, problem.mode)
            rows[peer.name] = row
            row.status, row.note = self._verdict(peer, problem)
            if row.status != "to run":
                continue
            truth = truth or case.truth(problem)
            if self._check(case, peer, row, problem, truth):
                passed.append(row)
        in_order = [rows[name] for name in case.peers if name in rows]
        if not passed:
            return Group(case, problem, in_order)
        timed = [row for row in in_order if row in passed]
        yardstick = self._yardstick(case, problem)
        return Group(case, problem, in_order, timed, truth, yardstick, *self._schedule(timed, case))

    def _verdict(self, peer: Peer, problem: Problem) -> tuple[str, str]:
        """Status and note of a peer that is not run on this problem, or "to run"."""
        reason = peer.why_not()
        if reason:
            return "not run", reason
        needed = peer.predicted_mib(problem)
        if needed > self.limit_mib:
            return "out of memory", f"needs about {needed / 1024:.0f} GiB, the limit is {self.limit_mib / 1024:.0f} GiB"
        expected_s = self._expected_seconds(problem)
        own_s = expected_s.get(peer.name, 0.0)
        limit_s = self.config.call_limit_s * CASES[problem.case].patience
        if own_s > HOPELESS * min(expected_s.values(), default=0.0):
            limit_s = min(limit_s, HOPELESS_S)
        if own_s > limit_s:
            return "not run", f"about {own_s:.0f} s a call expected, the limit is {limit_s:.3g} s"
        return "to run", ""

    def _expected_seconds(self, problem: Problem) -> dict[str, float]:
        """Seconds a call of every peer: the last N's times the ratio of N^2; a peer given up earlier keeps its last."""
        latest = {}
        wanted = {"case": problem.case, "d": problem.d, "dtype": problem.dtype, "mode": problem.mode}
        known = (self.earlier.measured(**wanted) if self.earlier else []) + self.results.measured(**wanted)
        for row in sorted(known, key=lambda row: row.n):
            if row.n < problem.n:
                latest[row.peer] = row.seconds["median"] * (problem.n / row.n) ** 2
        return latest

    def _check(self, case: Case, peer: Peer, row: Row, problem: Problem, truth: Truth) -> bool:
        """Peak memory and error in a process of its own; whether the peer is to be timed."""
        if not self.config.memory:
            return True  # the warm-up of the paired runs checks it
        threads = self.config.threads
        try:
            peak = run_in_child(memory.measure_peak, peer.name, problem, truth, threads=threads)
        except ChildError as error:
            row.status, row.note = "failed", str(error)
            return False
        row.peak_mib, row.peak_method, row.child_s, row.error = peak.peak_mib, peak.method, peak.seconds, peak.error
        if peer.name == case.reference:
            self.yardsticks[case.name, problem.dtype] = self._yardstick(case, problem) | peak.error
        wrong = case.complaint(peak.error, self._yardstick(case, problem), problem.dtype)
        if wrong:
            row.status, row.note = "wrong", wrong
        return wrong is None or self.config.time_wrong

    def _yardstick(self, case: Case, problem: Problem) -> dict[str, float]:
        """The plain form's errors: on this problem or the last it ran on, else on a small one."""
        key = case.name, problem.dtype
        if key not in self.yardsticks:
            small = problem.of_size(YARDSTICK_ROWS)
            if case.peers[case.reference].why_not():
                return {}
            found = case.peers[case.reference].prepare(small)()
            self.yardsticks[key] = errors(case.observe(found, small), case.truth(small))
        return self.yardsticks[key]

    def _next_process(self, group: Group) -> None:
        """Paired runs in one more process, from the last peer to the first in every second one; and what follows."""
        made = len(group.measured)
        self.tell(f"{group.problem}: paired runs, process {made + 1}")
        names = [row.peer for row in group.timed][:: -1 if made % 2 else 1]
        arguments = (names, group.problem, group.truth, group.yardstick, group.schedule)
        try:
            found = run_in_child(measure_rounds, *arguments, self.config.time_wrong, threads=self.config.threads)
        except ChildError as error:
            group.processes = made
            for row in group.timed:
                row.status, row.note = "failed", f"paired runs: {error}"
            return
        group.measured.append(found)
        for row in group.timed:
            if reason := found.failure.get(row.peer):
                row.status, row.note = "wrong" if reason.startswith("wrong") else "failed", reason
        self._summarise(group)

    def _schedule(self, rows: list[Row], case: Case) -> tuple[int, Schedule]:
        """How many processes, and what each is to do."""
        known = {row.peer: row.child_s or 0.0 for row in rows}
        cold = tuple(name for name, s in known.items() if s > COLD_IS_WARM_S and not case.peers[name].compiles)
        round_s = sum(known.values())
        if min(known.values()) > CHILD_COUNTS_S:
            return 1 if round_s > LONG_ROUND_S else 2, Schedule(range(1, 2), 0.0, cold)
        affordable = int(PATIENCE * self.config.group_s / max(round_s, 1e-3))
        processes = min(self.config.processes, max(FEWEST, affordable))
        rounds = range(max(1, min(ROUNDS.start, affordable // processes)), ROUNDS.stop)
        return processes, Schedule(rounds, self.config.group_s / processes, cold)

    def _summarise(self, group: Group) -> None:
        """Medians, spreads and ratios of the peers that every process has timed."""
        case, problem, measured = group.case, group.problem, group.measured
        rows = [row for row in group.timed if all(row.peer in rounds.seconds for rounds in measured)]
        times = {row.peer: [s for rounds in measured for s in rounds.seconds[row.peer]] for row in rows}
        child_counts = min(row.child_s or 0.0 for row in group.timed) > CHILD_COUNTS_S
        base = times.get(rows[0].peer) if rows and rows[0].peer == self._first(case, problem) else None
        for row in rows:
            runs, made = times[row.peer], [len(rounds.seconds[row.peer]) for rounds in measured]
            row.status = "wrong" if row.status == "wrong" else "measured"
            for rounds in measured:
                for name, value in rounds.error.get(row.peer, {}).items():
                    row.error[name] = max(value, row.error.get(name, 0.0))
            row.seconds = asdict(Spread.of([row.child_s, *runs], [1, *made]) if child_counts else Spread.of(runs, made))
            row.ratio = asdict(paired(runs, base, made)) if base else None
            if measured[0].gflops:
                _compare_with_floor(row, runs, measured, *case.floor(problem))

    def _first(self, case: Case, problem: Problem) -> str:
        """The peer that the others' times are divided by: the first that can run here."""
        wanted = [peer for peer in case.peers.values() if case.wants(peer, problem, self.config)]
        return next((peer.name for peer in wanted if peer.why_not() is None), "")


def _compare_with_floor(row: Row, runs: list[float], measured: list[Rounds], flop: float, moved: float) -> None:
    """Floors of every round, from the rates that were measured in it, over the time of the same round."""
    row.byte_floor_s = moved / median(rounds.gbytes for rounds in measured) / 1e9
    rates, row.gemm_library = _fastest(measured, row.dtype)
    fp32_rates, _ = _fastest(measured, "fp32")
    floors, fp32_floors = ([max(flop / r / 1e9, row.byte_floor_s) for r in each] for each in (rates, fp32_rates))
    row.gemm_gflops, row.floor_s = median(rates), median(floors)
    made = [len(rounds.seconds[row.peer]) for rounds in measured]
    row.share, row.fp32_share = asdict(paired(floors, runs, made)), asdict(paired(fp32_floors, runs, made))


def _fastest(measured: list[Rounds], dtype: str) -> tuple[list[float], str]:
    """GFLOP/s round by round of the library with the highest median, and which that is."""
    rates = defaultdict(list)
    for rounds in measured:
        for library, samples in rounds.gflops[dtype].items():
            rates[library] += samples
    rounds_made = max(map(len, rates.values()))
    rates = {library: samples for library, samples in rates.items() if len(samples) == rounds_made}
    library = max(rates, key=lambda name: median(rates[name]))
    return rates[library], library
