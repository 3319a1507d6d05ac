"""The benchmark suite measures what it says: its references, its peers, its checks, and its runs."""

import math
import os
import random
import time
from dataclasses import replace

import pytest
import torch
from benchmark_cases import SMALL, D, N, in_this_process, run

from fastclip import reference
from fastclip.benchmarks import external, foreign, guard, memory, noise, suite
from fastclip.benchmarks.case import TRAINING, Problem, errors
from fastclip.benchmarks.cases import CASES
from fastclip.benchmarks.children import ChildError, run_in_child
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.measure import Spread, interleaved, paired
from fastclip.benchmarks.peers import open_clip
from fastclip.benchmarks.problems import batch
from fastclip.benchmarks.results import Results, Row
from fastclip.benchmarks.run import Runner, _compare_with_floor
from fastclip.benchmarks.timing import Rounds
from fastclip.benchmarks.truth import truth

SMALL_SIZES = {"loading": 3}  # pictures of 320 x 256
CLIP = CASES["clip"]


def every_problem():
    """Each case at N, in every dtype and mode it has, with each of its peers that needs no compiler."""
    config = Config(sizes=(N,), d=D, dtypes=("fp32", "bf16"), widths=(), threads=1).resolved()
    for case in CASES.values():
        for problem in case.problems(config):
            problem = problem.of_size(SMALL_SIZES.get(case.name, N))
            for peer in case.peers.values():
                if case.wants(peer, problem, config) and not peer.compiles:
                    yield pytest.param(problem, peer.name, id=f"{problem} {peer.name}")


@pytest.fixture
def patchable(monkeypatch):
    monkeypatch.setattr("fastclip.benchmarks.run.run_in_child", in_this_process)
    return monkeypatch


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("sample", (N, 10), ids=("every row", "a sample"))
def test_truth_of_the_clip_loss_is_the_reference(dtype, sample, monkeypatch):
    monkeypatch.setattr("fastclip.benchmarks.truth.CHUNK_ELEMENTS", 7 * N)  # ragged chunks
    data = batch(Problem("clip", N, D, dtype, TRAINING))
    leaves = [leaf.detach().double().requires_grad_() for leaf in data.leaves]
    loss = reference.clip_loss(*leaves, normalize=False)
    names = ("image_grad", "text_grad", "scale_grad")
    found = {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))}
    expected = truth(data, sample)
    assert len(expected.rows["image_grad"]) == sample
    error = errors(found, expected)
    assert len(error) == 4 and max(error.values()) < 1e-11


def test_truth_of_the_sigmoid_is_the_reference(monkeypatch):
    monkeypatch.setattr("fastclip.benchmarks.truth.CHUNK_ELEMENTS", 7 * N)
    from fastclip.benchmarks import siglip

    problem = Problem("siglip", N, D, "fp32", TRAINING)
    siglip._truth.cache_clear()
    leaves = [leaf.detach().double().requires_grad_() for leaf in batch(problem, siglip.SCALE).leaves]
    leaves.append(torch.tensor(siglip.BIAS, dtype=torch.float64, requires_grad=True))
    loss = reference.siglip_loss(*leaves, normalize=False).mean()
    names = ("image_grad", "text_grad", "scale_grad", "bias_grad")
    found = {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))}
    assert max(errors(found, CASES["siglip"].truth(problem)).values()) < 1e-11


# sentence-transformers is of the first two kinds; webdataset leaves its file open.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("problem", "name"), list(every_problem()))
def test_every_peer_computes_its_case(problem, name):
    case = CASES[problem.case]
    peer, plain = case.peers[name], case.peers[case.reference]
    if reason := peer.why_not():
        pytest.skip(reason)
    expected = case.truth(problem)
    allowed = {}
    if plain.why_not() is None and plain.can(problem):
        allowed = errors(case.observe(plain.prepare(problem)(), problem), expected)
    error = errors(case.observe(peer.prepare(problem)(), problem), expected)
    assert case.complaint(error, allowed, problem.dtype) is None


def test_open_clips_form_is_its_loss():
    if reason := foreign.why_not_open_clip():
        pytest.skip(reason)
    leaves = batch(Problem("clip", N, D, "fp32", TRAINING)).leaves
    theirs = foreign.open_clip_losses().ClipLoss()(*leaves)
    assert torch.equal(open_clip(*leaves), theirs)


def test_accumulation_that_counts_the_scale_for_every_piece_is_found_out(monkeypatch):
    if reason := foreign.why_not_open_clip():
        pytest.skip(reason)
    monkeypatch.setattr("fastclip.benchmarks.step.PIECE", N // 3)
    case, problem = CASES["step"], Problem("step", N, D, "fp32", "one step")
    error = errors(case.peers["openclip-accum"].prepare(problem)(), case.truth(problem))
    assert error["log_scale"] == pytest.approx(2.0, rel=1e-3)  # three times the gradient
    assert "wrong log_scale" in case.complaint(error, {}, "fp32")


def test_a_wrong_result_is_refused_and_timed_only_on_request(patchable):
    wrong = replace(CLIP.peers["eager"], prepare=lambda problem: lambda: {"loss": torch.tensor(1.0)})
    patchable.setitem(CLIP.peers, "eager", wrong)
    eager, dense = run(replace(SMALL, modes=("forward",))).rows
    assert (eager.status, eager.seconds) == ("wrong", None)
    assert "wrong loss: relative error" in eager.note
    assert dense.status == "measured" and dense.ratio is None  # nothing right to compare with
    for settings in (replace(SMALL, time_wrong=True), replace(SMALL, time_wrong=True, memory=False)):
        eager, dense = run(replace(settings, modes=("forward",))).rows
        assert (eager.status, dense.status) == ("wrong", "measured")
        assert eager.seconds and eager.error["loss"] > 0.1


def test_a_peer_that_crashes_is_named_with_the_reason(patchable):
    def crash(problem):
        raise RuntimeError("no kernel\nat line 3")

    patchable.setitem(CLIP.peers, "eager", replace(CLIP.peers["eager"], prepare=crash))
    eager, dense = run(replace(SMALL, modes=("forward",), memory=False)).rows
    assert (eager.status, eager.note) == ("failed", "RuntimeError: no kernel")
    assert dense.status == "measured"


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1.0))
def test_no_dense_error_excuses_a_useless_result(value):
    assert CLIP.complaint({"loss": value}, {"loss": 1.0}, "fp32")


def test_nothing_to_compare_is_no_success():
    with pytest.raises(ValueError, match="nothing to compare"):
        errors({"other": torch.ones(1)}, truth(batch(Problem("clip", 4, 2, "fp32", TRAINING))))


def test_a_peer_without_room_or_time_is_named_with_the_reason(patchable):
    patchable.setitem(CLIP.peers, "eager", replace(CLIP.peers["eager"], why_not=lambda: "pip install it"))
    rows = run(replace(SMALL, memory_limit_gib=1e-9)).rows
    assert (rows[0].status, rows[0].note) == ("not run", "pip install it")
    assert run(SMALL).rows[1].ratio["median"] == 1.0  # the others are divided by the first that can run
    assert rows[1].status == "out of memory" and "needs about" in rows[1].note
    slow = run(replace(SMALL, sizes=(N, 2 * N), peers=("dense",), modes=("forward",), call_limit_s=1e-9)).rows
    assert [row.status for row in slow] == ["measured", "not run"]
    assert "s a call expected" in slow[1].note


def test_what_is_not_installed_is_listed_with_its_line(monkeypatch):
    assert foreign.missing("torch", "torch") is None
    assert foreign.missing("no_such_module", "no-such-package").endswith("pip install no-such-package")
    absent = replace(CLIP.peers["chunked"], why_not=lambda: "pip install chunks")
    monkeypatch.setitem(CLIP.peers, "chunked", absent)
    assert suite._missing(SMALL) == ["Not measured, clip: 2 x linear_cross_entropy: pip install chunks"]


def test_a_run_in_child_processes_measures_times_memory_and_floor():
    eager, dense = run(replace(SMALL, modes=(TRAINING,), processes=2, group_s=2.0)).rows
    for row in (eager, dense):
        assert row.status == "measured" and len(row.seconds["runs"]) >= 2 * 3  # processes x the least rounds
        assert row.peak_mib is not None and row.peak_method in ("VmHWM", "ru_maxrss")
        assert set(row.error) == {"loss", "image_grad", "text_grad", "scale_grad"}
        assert row.floor_s > row.byte_floor_s > 0 and 0 < row.share["median"] < 1
    assert set(eager.ratio["runs"]) == {1.0} and len(dense.ratio["runs"]) == len(dense.seconds["runs"])


def test_the_share_of_the_floor_is_that_of_the_fastest_library_round_by_round():
    gflops = {"bf16": {"torch.mm": [10.0, 20.0], "oneDNN": [5.0, 5.0]}, "fp32": {"torch.mm": [100.0, 100.0]}}
    measured = [Rounds({"eager": [0.4, 0.2]}, gflops, gbytes=20.0)]
    row = Row("clip", "eager", "fastclip eager", N, D, "bf16", TRAINING)
    _compare_with_floor(row, [0.4, 0.2], measured, flop=2e9, moved=1e9)
    # 2 GFLOP at 10 and 20 GFLOP/s are 0.2 and 0.1 s; 1 GB at 20 GB/s is 0.05 s, more than the fp32 products' 0.02 s.
    assert row.share["runs"] == pytest.approx([0.5, 0.5]) and row.gemm_library == "torch.mm"
    assert row.fp32_share["runs"] == pytest.approx([0.125, 0.25]) and row.byte_floor_s == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("calls_s", "processes", "rounds", "cold"),
    [
        ((0.01, 0.02), 4, 2, 0),
        ((0.3, 8.0), 4, 2, 1),
        ((1.0, 15.0), 4, 1, 2),
        ((3.0, 30.0), 3, 1, 2),
        ((5.0, 9.0), 2, 1, 2),
        ((30.0, 31.0), 1, 1, 2),
    ],
    ids=("short", "one long", "all long", "fewer processes", "child counts", "very long"),
)
def test_slow_calls_get_fewer_rounds(calls_s, processes, rounds, cold):
    runner = Runner(Config(widths=(), threads=1).resolved(), Results("cpu", {}), tell=lambda what: None)
    rows = [replace(Row("clip", name, "", N, D, "fp32", TRAINING), child_s=s)
            for name, s in zip(("eager", "dense"), calls_s, strict=True)]  # fmt: skip
    made, schedule = runner._schedule(rows, CLIP)
    assert (made, schedule.rounds.start, len(schedule.cold)) == (processes, rounds, cold)


def test_peak_memory_counts_the_matrices_of_the_dense_loss():
    # Two logits of 1024 x 1024 and their softmax: 4 MiB each, in a process of its own.
    problem = Problem("clip", 1024, 32, "fp32", TRAINING)
    peak = run_in_child(memory.measure_peak, "dense", problem, CLIP.truth(problem), threads=1)
    if peak.method == "VmHWM":
        assert 10 < peak.peak_mib < 24


def test_a_child_that_fails_or_dies_says_how():
    with pytest.raises(ChildError, match=r"ValueError: .*'x'"):
        run_in_child(int, "x", threads=1)
    with pytest.raises(ChildError, match="ended with code 3"):
        run_in_child(os._exit, 3, threads=1)


def test_another_benchmark_that_fails_leaves_a_line(monkeypatch):
    monkeypatch.setitem(external.MODULES, "no_such", "Nothing")
    assert external.measure("no_such", SMALL)[0]["failed"].startswith("ModuleNotFoundError")
    assert "no_such" not in external.wanted(replace(SMALL, only=()))


def test_rounds_alternate_and_stop_at_the_budget():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    times = interleaved(calls, lambda: order.append("-"), range(3, 9), budget_s=0.0)
    assert "".join(order) == "-AB-BA-AB"
    assert all(len(runs) == 3 for runs in times.values())


def test_ratios_are_taken_within_a_round():
    # The machine was twice as slow in the second round: the ratio does not move.
    assert paired([2.0, 4.0], [1.0, 2.0]) == Spread(2.0, 2.0, 2.0, [2.0, 2.0])


def test_the_spread_is_of_the_runs_and_leaves_their_tails_out():
    spread = Spread.of([float(i) for i in range(1, 12)])
    assert (spread.low, spread.median, spread.high) == (2.0, 6.0, 10.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, [3.0])


def test_the_spread_of_few_processes_reaches_to_their_medians():
    quiet, slow = [1.0] * 20, [2.0, 2.0]
    assert Spread.of(quiet + slow).high == 1.0  # 2 of 22 are beyond the 90th percentile
    spread = Spread.of(quiet + slow, [20, 2])
    assert (spread.low, spread.median, spread.high, spread.processes) == (1.0, 1.0, 2.0, [20, 2])
    assert paired([4.0, 2.0], [2.0, 2.0], [1, 1]) == Spread(1.5, 1.0, 2.0, [2.0, 1.0], [1, 1])


def test_the_spread_of_three_processes_is_their_confidence_interval():
    # Logarithms -0.1, 0, 0.1: standard deviation 0.1, and the interval 4.303 x 0.1 / sqrt(3) to each side.
    spread = Spread.of([math.exp(x) for x in (-0.1, 0.0, 0.1)], [1, 1, 1])
    assert (math.log(spread.low), math.log(spread.high)) == pytest.approx((-0.24843, 0.24843), abs=1e-5)


@pytest.mark.parametrize("within", (0.02, 0.2), ids=("processes differ", "rounds differ"))
def test_two_runs_of_the_same_agree_within_their_spreads(within):
    """4 processes of 2 rounds each; the processes' own deviation is 0.2."""
    draw, pairs = random.Random(0), 1000

    def spread() -> Spread:
        processes = [draw.gauss(0, 0.2) for _ in range(4)]
        return Spread.of([math.exp(x + draw.gauss(0, within)) for x in processes for _ in "AB"], [2] * 4)

    apart = sum(not guard.overlap(spread(), spread()) for _ in range(pairs))
    assert apart <= 0.01 * pairs


def test_processes_of_a_problem_are_spread_over_the_run_and_turn_the_order_round(patchable):
    order = []

    def measure_rounds(names, problem, *rest):
        order.append((problem.mode, names))
        return Rounds({name: [float(len(order))] for name in names}, error={name: {} for name in names})

    patchable.setattr("fastclip.benchmarks.run.measure_rounds", measure_rounds)
    rows = run(replace(SMALL, memory=False, processes=2)).rows
    there, back = ["eager", "dense"], ["dense", "eager"]
    assert order == [("forward", there), (TRAINING, there), ("forward", back), (TRAINING, back)]
    assert [row.seconds["runs"] for row in rows[::2]] == [[1.0, 3.0], [2.0, 4.0]]


def test_paired_runs_that_end_their_process_fail_their_problem_alone(patchable):
    processes = []

    def measure_rounds(names, problem, *rest):
        processes.append(problem.mode)
        if processes == ["forward", TRAINING, "forward"]:
            raise ChildError("its process ended")
        return Rounds({name: [1.0] for name in names})

    patchable.setattr("fastclip.benchmarks.run.measure_rounds", measure_rounds)
    rows = run(replace(SMALL, memory=False, processes=3)).rows
    assert [(row.status, row.note) for row in rows[:2]] == [("failed", "paired runs: its process ended")] * 2
    assert [len(row.seconds["runs"]) for row in rows[2:]] == [3, 3]


def test_own_work_is_not_taken_for_other_programs(monkeypatch):
    before = noise._counters()
    if before is not None:  # Linux
        until = time.process_time() + 0.2
        while time.process_time() < until:
            sum(range(1000))
        everybody, _, own = (b - a for a, b in zip(before, noise._counters(), strict=True))
        assert 0.15 < own < everybody + 0.1  # both count in hundredths of a second
        assert noise.Noise().measured() == {}  # too short to tell
        monkeypatch.setattr(noise, "SHORTEST_S", 0.0)
        assert set(noise.Noise().measured()) == {"others_cores", "stolen_cores", "cpu_s"}
    assert noise.warning([{"others_cores": 0.1, "stolen_cores": 0.0}, {}], 2) is None
    assert noise.warning([{"others_cores": 1.5}], 2).startswith("Other programs used 1.5 of the 2 cores")


@pytest.mark.parametrize(
    "wrong",
    (
        {"dtypes": ("fp8",)},
        {"only": ("clap",)},
        {"modes": ()},
        {"threads": -1},
        {"sizes": (1,)},
        {"threshold": 1.0},
    ),
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=r"--"):
        Config(**wrong).check()


def test_flags_fill_in_what_was_left_out():
    assert Config(quick=True).resolved().dtypes == ("fp32",)
    assert not Config().wants("large_batch") and Config(only=("large_batch",)).wants("large_batch")
    full = Config(processes=5, widths=()).resolved()
    assert (full.processes, full.widths) == (5, ()) and full.threads == torch.get_num_threads()


def test_a_quick_run_compiles_once():
    config = Config(quick=True, only=("clip",)).resolved()
    compiled = [problem for problem in CLIP.problems(config) if CLIP.wants(CLIP.peers["compile"], problem, config)]
    assert [(problem.n, problem.mode) for problem in compiled] == [(4096, TRAINING)]
