"""Options of `python -m pytest benchmarks`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastclip benchmarks")
    group.addoption("--sizes", type=int, nargs="+", default=[1024, 2048], help="batch sizes N (default 1024 2048)")
    group.addoption("--dim", type=int, default=512, help="width D of the embeddings (default 512)")
    group.addoption("--threads", type=int, default=2, help="threads of torch and of the kernels (default 2)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "n" in metafunc.fixturenames:
        metafunc.parametrize("n", metafunc.config.getoption("sizes"))
