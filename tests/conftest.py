"""Fixtures every test file may use."""

import os
import random
import zlib

import numpy
import pytest
import torch
from cases import BACKENDS
from hypothesis import settings

from fastclip import plain

# Bounded and repeatable: the same examples on every machine, and no deadline on one that is busy.
settings.register_profile("fastclip", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("fastclip")

# Every test draws its own numbers, the same ones wherever and in whatever company it runs; another seed draws others.
SEED = int(os.environ.get("FASTCLIP_TEST_SEED", "0"))


def pytest_report_header() -> str:
    return f"random numbers: FASTCLIP_TEST_SEED={SEED}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture of the test, so that a module's fixtures draw the same numbers too."""
    seed = zlib.crc32(f"{SEED} {item.path.name} {item.name}".encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(params=[*BACKENDS, *(["cpu-graph"] if "cpu" in BACKENDS else [])])
def backend(request, monkeypatch) -> str:
    """Each backend that can run on this machine; the C++ kernels twice, once without their way for the plain loss."""
    if request.param == "cpu-graph":
        monkeypatch.setattr(plain, "serves", lambda *args: False)
    return request.param.removesuffix("-graph")


@pytest.fixture(autouse=True)
def _same_threads():
    """A test that sets torch's number of threads sets it for itself alone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test: threads(2)."""
    return torch.set_num_threads
