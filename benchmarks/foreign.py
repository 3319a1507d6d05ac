"""Losses of other packages, and why one cannot run here."""

import functools
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

# What importing torchvision describes, and defines itself only where its extension can be loaded.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def missing(module: str, package: str) -> str | None:
    """None where the module is installed, else what to install."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{package} is not installed; pip install {package}"


def why_not_open_clip() -> str | None:
    return missing("open_clip", "open_clip_torch")


@functools.cache
def open_clip_losses() -> ModuleType:
    """OpenCLIP's loss.py on its own: the whole package needs torchvision and seconds to import."""
    package: ModuleSpec = importlib.util.find_spec("open_clip")
    file = Path(package.origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def stand_in_for_torchvision() -> torch.library.Library | None:
    """Makes torchvision importable beside a CPU build of torch, where PyPI's wheel wants CUDA's libraries.

    transformers imports it; nothing here uses its operators, so that naming the two it describes is enough. The result
    is kept: its definitions go when it is collected.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for extension in Path(spec.origin).parent.glob("_C.*so"):
            torch.ops.load_library(str(extension))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in OPERATORS:
            library.define(schema)
        return library
    return None
