"""The suite's timed cases under pytest-benchmark, to compare one commit with another:

    python -m pytest benchmarks --benchmark-autosave
    python -m pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

Every result is checked against float64 first; a wrong one fails. `-k "clip and cpu"` picks, --sizes sets N.
"""

import functools

import pytest
import torch

from fastclip.benchmarks import machine
from fastclip.benchmarks.case import Problem, Truth, errors
from fastclip.benchmarks.cases import CASES

# torch.compile's own imports and sentence-transformers' warn; webdataset leaves its file open.
IGNORED = ("DeprecationWarning", "FutureWarning", "ResourceWarning", "pytest.PytestUnraisableExceptionWarning")
pytestmark = pytest.mark.filterwarnings(*(f"ignore::{kind}" for kind in IGNORED))


def test_case(benchmark, request, problem: Problem, peer_name: str) -> None:
    case = CASES[problem.case]
    peer = case.peers[peer_name]
    reason = peer.why_not()
    if reason:
        pytest.skip(reason)
    threads = request.config.getoption("threads") or torch.get_num_threads()
    torch.set_num_threads(threads)
    truth, yardstick = _expected(problem)
    call = peer.prepare(problem)
    wrong = case.complaint(errors(case.observe(call(), problem), truth), yardstick, problem.dtype)
    if wrong and not peer.label.startswith("fastclip"):
        pytest.xfail(wrong)  # another project's result: known, and not timed
    assert wrong is None, wrong

    benchmark.group = str(problem)
    benchmark.extra_info["machine"] = machine.describe(threads)
    benchmark.pedantic(call, rounds=request.config.getoption("rounds"), warmup_rounds=1)


@functools.lru_cache(maxsize=1)
def _expected(problem: Problem) -> tuple[Truth, dict[str, float]]:
    """The float64 result, and the plain form's error, where that can run."""
    case = CASES[problem.case]
    truth, plain = case.truth(problem), case.peers[case.reference]
    if plain.why_not() or not plain.can(problem):
        return truth, {}
    return truth, errors(case.observe(plain.prepare(problem)(), problem), truth)
