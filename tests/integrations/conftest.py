"""What the tests of the integrations need before they import the libraries."""

import importlib.util
from pathlib import Path

import pytest
import torch

# torchvision, which OpenCLIP imports, comes from PyPI linked against CUDA. Beside a CPU build of torch its extension
# cannot be loaded, and importing it then fails where it describes two operators that nobody has defined. The tests use
# none of them: naming the two is enough.
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _stand_in_for_torchvision_operators() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for extension in Path(spec.origin).parent.glob("_C.*so"):
            torch.ops.load_library(str(extension))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in _OPERATORS:
            library.define(schema)
        return library
    return None


_LIBRARY = _stand_in_for_torchvision_operators()  # kept: its definitions go when it is collected


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are too small to share among threads; waiting for them would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
