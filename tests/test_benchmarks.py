"""The benchmark suite measures what it says: its reference, its checks, its files and its tables."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import machine, memory, report, results
from benchmarks.config import Config
from benchmarks.measure import Spread, interleaved, make_call, paired_ratio
from benchmarks.peers import PEERS
from benchmarks.problems import FORWARD, MODES, TRAINING, Problem
from benchmarks.results import Results, Row
from benchmarks.run import Runner
from benchmarks.truth import complaint, errors, truth
from fastclip import reference

N, D = 96, 24
SMALL = Config(sizes=(N,), d=D, peers=("eager", "dense"), dtypes=("fp32",), memory=False, group_s=0.0)
runnable = [name for name, peer in PEERS.items() if not peer.compiles]


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("sample", (N, 10), ids=("every row", "a sample"))
def test_truth_is_the_reference(dtype, sample, monkeypatch):
    monkeypatch.setattr("benchmarks.truth.CHUNK_ELEMENTS", 7 * N)  # ragged chunks
    batch = Problem(N, D, dtype).batch()
    leaves = [leaf.detach().double().requires_grad_() for leaf in batch.leaves]
    loss = reference.clip_loss(*leaves, normalize=False)
    found = (loss.detach(), *torch.autograd.grad(loss, leaves))
    expected = truth(batch, sample)
    assert len(expected.sample) == sample
    assert max(errors(found, expected).values()) < 1e-11


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("name", runnable)
def test_every_peer_computes_this_loss(name, dtype):
    if dtype not in PEERS[name].dtypes or PEERS[name].why_not():
        pytest.skip("not here")
    batch = Problem(N, D, dtype).batch()
    expected = truth(batch)
    dense_error = errors(make_call(PEERS["dense"].build(), batch, TRAINING)(), expected)
    for mode in MODES:
        error = errors(make_call(PEERS[name].build(), batch, mode)(), expected)
        assert complaint(error, dense_error, dtype) is None


def test_a_wrong_result_is_refused_and_not_timed(monkeypatch):
    monkeypatch.setitem(PEERS, "eager", replace(PEERS["eager"], build=lambda: lambda x, y, scale: (x * y).sum()))
    rows = _run(SMALL).rows
    assert [row.status for row in rows] == ["failed", "measured", "failed", "measured"]
    assert "wrong loss" in rows[0].note
    assert rows[0].seconds is None
    assert rows[1].ratio is None  # nothing right to compare with


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1.0))
def test_no_dense_error_excuses_a_useless_result(value):
    assert complaint({"loss": value}, {"loss": 1.0}, "fp32")


def test_a_peer_without_room_or_time_is_named_with_the_reason(monkeypatch):
    monkeypatch.setitem(PEERS, "eager", replace(PEERS["eager"], why_not=lambda: "pip install it"))
    rows = _run(replace(SMALL, memory_limit_gib=1e-9)).rows
    assert (rows[0].status, rows[0].note) == ("not run", "pip install it")
    assert rows[1].status == "out of memory"
    slow = _run(replace(SMALL, sizes=(N, 2 * N), peers=("dense",), call_limit_s=1e-9)).rows
    assert [row.status for row in slow] == ["measured"] * 2 + ["not run"] * 2
    assert "s a call expected" in slow[2].note


def test_peak_memory_counts_the_matrices_of_the_dense_loss():
    # Two logits of 1024 x 1024 and their softmax: 4 MiB each, in a process of its own.
    problem = Problem(1024, 32, "fp32")
    expected = truth(problem.batch())
    child = memory.run_in_child("dense", problem, TRAINING, expected, threads=1)
    assert child.failure is None
    assert child.method == "VmHWM" or child.method == "ru_maxrss"
    if child.method == "VmHWM":
        assert 10 < child.peak_mib < 24


def test_rounds_alternate_and_stop_at_the_budget():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    times = interleaved(calls, lambda: None, range(3, 9), budget_s=0.0)
    assert "".join(order) == "ABBAAB"
    assert all(len(runs) == 3 for runs in times.values())


def test_ratios_are_taken_within_a_round():
    # The machine was twice as slow in the second round: the ratio does not move.
    assert paired_ratio([2.0, 4.0], [1.0, 2.0]) == Spread(2.0, 2.0, 2.0, [2.0, 2.0])


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    found = _run(SMALL)
    path = tmp_path / "new" / "x.json"
    found.save(path)
    assert results.load(path) == found
    assert json.loads(path.read_text())["machine"]["cpu"] == machine.cpu_model()
    assert results.new_path(path.parent, "x").name == "x-2.json"
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema 0, expected 1"):
        results.load(path)


def test_the_exponent_is_fitted_from_4096_to_16384():
    rows = [_row(n, seconds=n**2.5 * 1e-9) for n in (4096, 8192, 16384)]
    found = Results("cpu", {}, {}, [_row(1024, seconds=5.0), *rows])
    assert found.exponent(peer="eager") == pytest.approx(2.5)
    assert Results("cpu", {}, {}, rows[:2]).exponent(peer="eager") is None


def test_tables_are_rewritten_between_their_markers():
    found = Results("cpu", machine.describe(2), {}, [_row(4096, seconds=0.05), _row(8192, seconds=0.2)])
    document = (
        "a\n<!-- bench:cpu-time-fp32-forward -->\nold\n<!-- /bench -->\nb\n<!-- bench:gpu-x -->\n<!-- /bench -->\n"
    )
    once = report.rewrite(document, found)
    assert "| fastclip eager | 50.0 ms | 0.200 s |" in once
    assert "old" not in once
    assert "<!-- bench:gpu-x -->\n<!-- /bench -->" in once
    assert report.rewrite(once, found) == once
    with pytest.raises(ValueError, match="no table is called"):
        report.rewrite(document.replace("time", "thyme"), found)
    with pytest.raises(ValueError, match="no rows"):
        report.rewrite(document.replace("fp32", "bf16"), found)


def test_every_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    from benchmarks import plots

    rows = [_row(4096, seconds=0.05), _row(8192, seconds=0.2)]
    rows.append(replace(_row(16384, seconds=1.0), status="out of memory", seconds=None))
    found = Results("cpu", machine.describe(2), {"d": D}, rows)
    pictures = plots.save(found, tmp_path / "x.json")
    assert [picture.name for picture in pictures] == ["x-time.png", "x-memory.png", "x-floor.png"]


@pytest.mark.parametrize("wrong", ({"dtypes": ("fp8",)}, {"peers": ()}, {"threads": 0}, {"sizes": (1,)}))
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=r"--"):
        Config(**wrong)


def _run(config: Config) -> Results:
    found = Results("cpu", machine.describe(2), {"d": config.d})
    Runner(config.resolved(), found, tell=lambda what: None).run(finished=lambda rows: None)
    return found


def _row(n: int, seconds: float) -> Row:
    spread = {"median": seconds, "low": seconds, "high": seconds, "runs": [seconds]}
    shares = {"floor_s": seconds / 2, "share": 0.5, "fp32_share": 0.5, "gemm_gflops": 100.0}
    row = Row("eager", "fastclip eager", n, D, "fp32", FORWARD, "measured", seconds=spread, peak_mib=10.0, **shares)
    return replace(row, error={"loss": 1e-7})
