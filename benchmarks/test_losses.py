"""The timed cases under pytest-benchmark, to compare one commit with another:

    python -m pytest benchmarks --benchmark-only --benchmark-autosave
    python -m pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

Every result is checked against float64 first; a wrong one fails. `-k "cpu and fp32"` picks, --sizes sets N.
"""

import functools

import pytest
import torch

from benchmarks import machine
from benchmarks.measure import make_call
from benchmarks.peers import PEERS, dense
from benchmarks.problems import MODES, TRAINING, Problem
from benchmarks.truth import Truth, complaint, errors, truth

# torch.compile's own imports warn
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("peer", PEERS)
def test_loss(benchmark, request, peer: str, dtype: str, mode: str, n: int) -> None:
    reason = PEERS[peer].why_not() if dtype in PEERS[peer].dtypes else f"not for {dtype}"
    if reason:
        pytest.skip(reason)
    torch.set_num_threads(request.config.getoption("threads"))
    problem = Problem(n, request.config.getoption("dim"), dtype)
    expected, dense_error = _expected(problem)
    call = make_call(PEERS[peer].build(), problem.batch(), mode)
    wrong = complaint(errors(call(), expected), dense_error, dtype)
    assert wrong is None, wrong

    benchmark.group = f"N={n} D={problem.d} {dtype} {mode}"
    benchmark.extra_info["machine"] = machine.describe(torch.get_num_threads())
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@functools.lru_cache(maxsize=1)
def _expected(problem: Problem) -> tuple[Truth, dict[str, float]]:
    """The float64 result, and the dense loss's error."""
    batch = problem.batch()
    expected = truth(batch)
    return expected, errors(make_call(dense, batch, TRAINING)(), expected)
