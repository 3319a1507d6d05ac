"""In which order it is measured. For every N, dtype and mode: who can run, peak memory and correctness of each in a
process of its own, correctness here, then paired runs of all that passed.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks import memory
from benchmarks.config import Config
from benchmarks.gemm import Ceiling
from benchmarks.measure import Call, Spread, interleaved, make_call, paired_ratio
from benchmarks.peers import PEERS, dense
from benchmarks.problems import TRAINING, Problem
from benchmarks.results import Results, Row
from benchmarks.truth import Truth, complaint, errors, truth

HOPELESS = 12  # a peer this many times slower than the fastest is followed up to calls of HOPELESS_S only
HOPELESS_S = 6.0
COLD_IS_WARM_S = 5.0  # a call this long does not notice a cold start
YARDSTICK_ROWS = 1024


class Runner:
    """One run of the suite. `tell` is called with what is being done, `finished` with each group's rows."""

    def __init__(self, config: Config, results: Results, tell: Callable[[str], None]) -> None:
        self.config, self.results, self.tell = config, results, tell
        torch.set_num_threads(config.threads)
        self.limit_mib = config.memory_limit_gib * 1024 if config.memory_limit_gib else 0.8 * memory.available_mib()
        tell("matrix products")
        self.ceilings = {dtype: Ceiling(dtype, config.d) for dtype in dict.fromkeys(("fp32", *config.dtypes))}
        self.dense_error = {dtype: self._yardstick(dtype) for dtype in config.dtypes}

    def steps(self) -> int:
        """How often `tell` will be called from now on."""
        config = self.config
        groups = [sum(config.wants(peer, problem.dtype) for peer in config.peers) + 1 for problem in config.problems()]
        return len(groups) + len(config.modes) * sum(groups)

    def run(self, finished: Callable[[list[Row]], None]) -> None:
        for problem in self.config.problems():
            self.tell(f"N={problem.n} {problem.dtype}: float64 reference")
            expected = truth(problem.batch())
            for mode in self.config.modes:
                rows = self._group(problem, mode, expected)
                self.results.rows += rows
                finished(rows)

    def _group(self, problem: Problem, mode: str, expected: Truth) -> list[Row]:
        rows, calls = [], {}
        batch = problem.batch()
        # The dense loss first: its error is the yardstick for the others.
        names = sorted(self.config.peers, key=lambda name: name != "dense")
        for name in names:
            if not self.config.wants(name, problem.dtype):
                continue
            self.tell(f"N={problem.n} {problem.dtype} {mode}: {PEERS[name].label}")
            row = Row(name, PEERS[name].label, problem.n, problem.d, problem.dtype, mode)
            row.status, row.note = self._verdict(name, problem, mode)
            if row.status == "to run":
                call = make_call(PEERS[name].build(), batch, mode)
                if self._check(row, call, problem, expected):
                    calls[name] = call
            rows.append(row)
        rows.sort(key=lambda row: self.config.peers.index(row.peer))
        self.tell(f"N={problem.n} {problem.dtype} {mode}: paired runs")
        self._time([row for row in rows if row.peer in calls], calls, problem, mode)
        return rows

    def _verdict(self, name: str, problem: Problem, mode: str) -> tuple[str, str]:
        """Status and note of a peer that is not run on this problem, or "to run"."""
        reason = PEERS[name].why_not()
        if reason:
            return "not run", reason
        needed = PEERS[name].predicted_mib(problem.n)
        if needed > self.limit_mib:
            return "out of memory", f"needs about {needed / 1024:.0f} GiB, the limit is {self.limit_mib / 1024:.0f} GiB"
        expected_s = self._expected_seconds(problem, mode)
        own_s, limit_s = expected_s.get(name, 0.0), self.config.call_limit_s
        if own_s > HOPELESS * min(expected_s.values(), default=0.0):
            limit_s = min(limit_s, HOPELESS_S)
        if own_s > limit_s:
            return "not run", f"about {own_s:.0f} s a call expected, the limit is {limit_s:.3g} s"
        return "to run", ""

    def _expected_seconds(self, problem: Problem, mode: str) -> dict[str, float]:
        """Seconds a call of every peer: the last N's times the ratio of N^2; a peer given up earlier keeps its last."""
        latest = {}
        for row in self.results.measured(dtype=problem.dtype, mode=mode):
            latest[row.peer] = row.seconds["median"] * (problem.n / row.n) ** 2
        return latest

    def _check(self, row: Row, call: Call, problem: Problem, expected: Truth) -> bool:
        """Fills in memory and errors; False, with the reason in the row, where the result is wrong."""
        if self.config.memory:
            child = memory.run_in_child(row.peer, problem, row.mode, expected, self.config.threads)
            if child.failure:
                return self._fail(row, child.failure)
            row.peak_mib, row.peak_method, row.child_s = child.peak_mib, child.method, child.seconds
            if not self._accept(row, child.error, problem.dtype):
                return False
        if _is_slow(row) and not PEERS[row.peer].compiles:
            return True
        try:
            found = call()
        except (RuntimeError, MemoryError) as error:
            return self._fail(row, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return self._accept(row, errors(found, expected), problem.dtype)

    def _accept(self, row: Row, error: dict[str, float], dtype: str) -> bool:
        row.error = error
        if row.peer == "dense":
            self.dense_error[dtype] = self.dense_error[dtype] | error
        wrong = complaint(error, self.dense_error[dtype], dtype)
        return self._fail(row, wrong) if wrong else True

    def _fail(self, row: Row, reason: str) -> bool:
        row.status, row.note = "failed", reason
        return False

    def _time(self, rows: list[Row], calls: dict[str, Call], problem: Problem, mode: str) -> None:
        ceilings = {self.ceilings["fp32"], self.ceilings[problem.dtype]}
        for ceiling in ceilings:
            ceiling.start()

        def between() -> None:
            gc.collect()
            for ceiling in ceilings:
                ceiling.sample()

        in_order = {row.peer: calls[row.peer] for row in rows}
        # Where every call is slow, those in the processes of their own were a round too.
        first_round = {row.peer: [row.child_s] for row in rows} if all(map(_is_slow, rows)) else {}
        rounds = self.config.rounds()
        rounds = range(rounds.start - bool(first_round), rounds.stop)
        times = interleaved(in_order, between, rounds, self.config.group_s)
        times = {peer: first_round.get(peer, []) + runs for peer, runs in times.items()}
        base = times.get(self.config.peers[0])
        for row in rows:
            runs = times[row.peer]
            row.status, row.seconds = "measured", asdict(Spread.of(runs))
            row.ratio = asdict(paired_ratio(runs, base)) if base else None
            self._shares(row, problem.flop(mode))

    def _shares(self, row: Row, flop: int) -> None:
        rate, row.gemm_library = self.ceilings[row.dtype].gflops()
        fp32_rate, _ = self.ceilings["fp32"].gflops()
        row.gemm_gflops = rate.median
        row.floor_s = flop / rate.median / 1e9
        row.share = row.floor_s / row.seconds["median"]
        row.fp32_share = flop / fp32_rate.median / 1e9 / row.seconds["median"]

    def _yardstick(self, dtype: str) -> dict[str, float]:
        """The dense loss's errors on a small batch, for sizes at which it does not run."""
        self.tell(f"{dtype}: error of the dense loss")
        batch = Problem(YARDSTICK_ROWS, self.config.d, dtype).batch()
        return errors(make_call(dense, batch, TRAINING)(), truth(batch))


def _is_slow(row: Row) -> bool:
    return row.child_s is not None and row.child_s > COLD_IS_WARM_S
