"""In which order it is measured. For every problem: who can run; peak memory and correctness of each, in a process of
its own; then paired runs of all that passed, spread over several processes.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict

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
PATIENCE = 6  # times --group-s that three rounds in each process may take
YARDSTICK_ROWS = 1024


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
        return sum(len(self._wanted(CASES[problem.case], problem)) + 1 for problem in self.problems)

    def run(self, finished: Callable[[list[Row]], None]) -> None:
        for problem in self.problems:
            rows = self._problem(CASES[problem.case], problem)
            self.results.add(rows)
            finished(rows)

    def again(self, problems: list[Problem]) -> None:
        """Measures these problems anew, in place of what the results have."""
        for problem in problems:
            self.results.add(self._problem(CASES[problem.case], problem))

    def _wanted(self, case: Case, problem: Problem) -> list[Peer]:
        """The plain form first: its error is the yardstick for the others."""
        peers = [peer for peer in case.peers.values() if case.wants(peer, problem, self.config)]
        return sorted(peers, key=lambda peer: peer.name != case.reference)

    def _problem(self, case: Case, problem: Problem) -> list[Row]:
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
        if passed:
            self.tell(f"{problem}: paired runs")
            self._time([row for row in in_order if row in passed], case, problem, truth)
        return in_order

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

    def _time(self, rows: list[Row], case: Case, problem: Problem, truth: Truth) -> None:
        """Paired runs in several processes, and what follows from them."""
        names = [row.peer for row in rows]
        processes, schedule = self._schedule(rows, case)
        yardstick = self._yardstick(case, problem)
        measured = []
        for _ in range(processes):
            arguments = (names, problem, truth, yardstick, schedule, self.config.time_wrong)
            try:
                measured.append(run_in_child(measure_rounds, *arguments, threads=self.config.threads))
            except ChildError as error:
                for row in rows:
                    row.status, row.note = "failed", f"paired runs: {error}"
                return
        failures = {name: reason for rounds in measured for name, reason in rounds.failure.items()}
        for row in rows:
            if row.peer in failures:
                wrong = failures[row.peer].startswith("wrong")
                row.status, row.note = "wrong" if wrong else "failed", failures[row.peer]
        timed = [row for row in rows if all(row.peer in rounds.seconds for rounds in measured)]
        times = {row.peer: [s for rounds in measured for s in rounds.seconds[row.peer]] for row in timed}
        child_counts = min(row.child_s or 0.0 for row in rows) > CHILD_COUNTS_S
        self._summarise(timed, times, case, problem, measured, child_counts)

    def _schedule(self, rows: list[Row], case: Case) -> tuple[int, Schedule]:
        """How many processes, and what each is to do."""
        processes, each_s = self.config.processes, self.config.group_s / self.config.processes
        known = {row.peer: row.child_s or 0.0 for row in rows}
        long = {name for name, seconds in known.items() if seconds > COLD_IS_WARM_S}
        cold = tuple(name for name in known if name in long and not case.peers[name].compiles)
        round_s = sum(known.values())
        if min(known.values()) > CHILD_COUNTS_S:
            return 1 if round_s > LONG_ROUND_S else 2, Schedule(range(1, 2), each_s, cold)
        affordable = PATIENCE * self.config.group_s / (processes * round_s) if round_s else 3.0
        return processes, Schedule(range(max(1, min(3, int(affordable))), 12), each_s, cold)

    def _summarise(self, rows, times, case: Case, problem: Problem, measured: list[Rounds], child_counts: bool) -> None:
        base = times.get(rows[0].peer) if rows and rows[0].peer == self._first(case, problem) else None
        for row in rows:
            runs = times[row.peer]
            row.status = "wrong" if row.status == "wrong" else "measured"
            for rounds in measured:
                for name, value in rounds.error.get(row.peer, {}).items():
                    row.error[name] = max(value, row.error.get(name, 0.0))
            row.seconds = asdict(Spread.of([row.child_s, *runs] if child_counts else runs))
            row.ratio = asdict(paired(runs, base)) if base else None
            if measured[0].gflops:
                _compare_with_floor(row, runs, measured, *case.floor(problem))

    def _first(self, case: Case, problem: Problem) -> str:
        """The peer that the others' times are divided by: the first that can run here."""
        wanted = [peer for peer in case.peers.values() if case.wants(peer, problem, self.config)]
        return next((peer.name for peer in wanted if peer.why_not() is None), "")


def _compare_with_floor(row: Row, runs: list[float], measured: list[Rounds], flop: float, moved: float) -> None:
    """Floors of every round, from the rates that were measured in it, over the time of the same round."""
    row.byte_floor_s = moved / Spread.of([rounds.gbytes for rounds in measured]).median / 1e9
    rates, row.gemm_library = _fastest(measured, row.dtype)
    fp32_rates, _ = _fastest(measured, "fp32")
    floors, fp32_floors = ([max(flop / r / 1e9, row.byte_floor_s) for r in each] for each in (rates, fp32_rates))
    row.gemm_gflops, row.floor_s = Spread.of(rates).median, Spread.of(floors).median
    row.share, row.fp32_share = asdict(paired(floors, runs)), asdict(paired(fp32_floors, runs))


def _fastest(measured: list[Rounds], dtype: str) -> tuple[list[float], str]:
    """GFLOP/s round by round of the library with the highest median, and which that is."""
    rates = defaultdict(list)
    for rounds in measured:
        for library, samples in rounds.gflops[dtype].items():
            rates[library] += samples
    rounds_made = max(map(len, rates.values()))
    rates = {library: samples for library, samples in rates.items() if len(samples) == rounds_made}
    library = max(rates, key=lambda name: Spread.of(rates[name]).median)
    return rates[library], library
