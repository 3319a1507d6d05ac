"""Fixtures every test file may use."""

import pytest
import torch
from cases import BACKENDS
from hypothesis import settings

# Bounded and repeatable: the same examples on every machine, and no deadline on one that is busy.
settings.register_profile("fastclip", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("fastclip")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Each backend that can run on this machine."""
    return request.param


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
