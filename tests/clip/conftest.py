"""What the tests of the models need before they import OpenCLIP."""

import pytest
import torch
import torchvision_stand_in  # noqa: F401


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are too small to share among threads; waiting for them would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
