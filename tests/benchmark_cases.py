"""What the tests of the benchmark suite share: settings of tiny runs, and rows as a run would leave them."""

from dataclasses import asdict, replace

from fastclip.benchmarks import machine
from fastclip.benchmarks.case import TRAINING
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.measure import Spread, paired
from fastclip.benchmarks.results import Results, Row
from fastclip.benchmarks.run import Runner

# 96: ragged against every tile, and of a size at which a call takes a millisecond.
N, D = 96, 24
SMALL = Config(
    only=("clip",),
    sizes=(N,),
    d=D,
    peers=("eager", "dense"),
    dtypes=("fp32",),
    modes=("forward", TRAINING),
    widths=(),
    threads=1,
    group_s=1e-3,
    processes=1,
)


def in_this_process(function, *arguments, threads):
    """Stands in for run_in_child: a child would not see what a test has patched."""
    return function(*arguments)


def run(config: Config) -> Results:
    found = Results("cpu", machine.describe(1))
    Runner(config.resolved(), found, tell=lambda what: None).run(finished=lambda rows: None)
    return found


def row(n: int, took_s: float, *, peer="eager", label="fastclip eager", mib=10.0, of_floor=0.5, **changes) -> Row:
    """A measured row of the CLIP loss in training; every round took the same."""
    runs = [took_s] * 3
    shares = asdict(Spread.of([of_floor] * 3))
    made = Row("clip", peer, label, n, D, "fp32", TRAINING, "measured")
    made.seconds, made.ratio = asdict(Spread.of(runs)), asdict(paired(runs, runs))
    made.peak_mib, made.error = mib, {"loss": 1e-7}
    made.share, made.fp32_share, made.floor_s, made.gemm_gflops = shares, shares, took_s * of_floor, 100.0
    return replace(made, **changes)


def results(*rows: Row) -> Results:
    part = {"date": "2026-01-31T10:00:00+00:00", "commit": "abc1234", "settings": {}, "took_s": 12.0}
    return Results("cpu", machine.describe(1), list(rows), {}, [part])
