"""Memory claims as tests: what autograd keeps, and whether anything of N x N elements is ever made.

Legend: N rows in the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd holds for backward once loss() is computed, each counted once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    assert value.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


class SquareMadeError(AssertionError):
    """A tensor with a multiple of N * N elements came out of an operator."""


class NoSquares(TorchDispatchMode):
    """Raises SquareMadeError when an operator returns a tensor that holds N twice among its dimensions.

    n must be a prime that divides no other dimension: then N * N divides the number of elements of those tensors only.
    Operators are seen as PyTorch dispatches them: not the bounded workspace inside one of fastclip's own.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() and leaf.numel() % self.n**2 == 0:
                raise SquareMadeError(f"{func} returned {tuple(leaf.shape)}")
        return result
