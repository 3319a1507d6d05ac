"""Lets torchvision, which OpenCLIP imports, be imported beside a CPU build of torch: import this module first.

From PyPI torchvision comes linked against CUDA. Its extension cannot be loaded then, and importing it fails where it
describes two operators that nobody has defined. The tests use none of them: naming the two is enough.
"""

import importlib.util
from pathlib import Path

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _define() -> torch.library.Library | None:
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


LIBRARY = _define()  # kept: its definitions go when it is collected
