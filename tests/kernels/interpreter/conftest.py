"""Triton's interpreter with current NumPy, small tiles, and buffers that start as NaN."""

import pytest
import torch
import triton.runtime.interpreter as interpreter

from fastclip.kernels import configs
from fastclip.kernels.configs import Tiles


def small(kernel: str, chip: str, product: str) -> Tiles:
    """Tiles of 32 x 64 (ranks.py wants squares), so that small problems have several, and edges."""
    columns = 32 if kernel == "ranks" else 64
    return Tiles(BN=32, BM=columns, BD=64 if product == "half" else 32, GROUP=2, warps=4, stages=1)


_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy(tensor, scope):
    """Triton 3.6 turns a one-element array into an int by int(array), which NumPy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_for_numpy


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(configs, "built_in", small)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Every uninitialised float buffer holds NaN, every integer one garbage: nothing may rely on what was there."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(77)

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_collection_modifyitems(items):
    # NumPy warns where a GPU is silent: exp of a masked-out entry may overflow before it is discarded.
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"))
