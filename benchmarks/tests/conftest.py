"""Options of `python -m pytest benchmarks`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastclip benchmarks")
    group.addoption("--sizes", type=int, nargs="+", default=[1024], help="sizes N (default 1024)")
    group.addoption("--dim", type=int, default=512, help="width D of the embeddings of the losses (default 512)")
    group.addoption("--dtypes", nargs="+", default=["fp32"], help="dtypes of the losses' features (default fp32)")
    group.addoption("--threads", type=int, default=None, help="threads of torch and of the kernels")
    group.addoption("--rounds", type=int, default=5, help="timed calls of each case (default 5)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each problem and peer of the suite's cases, at the sizes asked for."""
    if "peer_name" not in metafunc.fixturenames:
        return
    from fastclip.benchmarks.cases import CASES
    from fastclip.benchmarks.config import Config

    option = metafunc.config.getoption
    config = Config(sizes=tuple(option("sizes")), d=option("dim"), dtypes=tuple(option("dtypes")), widths=()).resolved()
    tests = [
        pytest.param(problem, peer.name, id=f"{problem}: {peer.name}".replace(" ", "-"))
        for case in CASES.values()
        for problem in case.problems(config)
        for peer in case.peers.values()
        if case.wants(peer, problem, config)
    ]
    metafunc.parametrize(("problem", "peer_name"), tests)
