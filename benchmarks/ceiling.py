"""What this machine can do at best, which sets the floor of every case: matrix products, and moving memory.

Two libraries (torch.mm, which is MKL in x86 wheels, and oneDNN) are tried on the losses' two kinds of product, long and
flat [n, D] [D, n] and square times tall [n, n] [n, D]; each library's better one is then run once a round.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastclip.benchmarks.case import DTYPES

TRIAL_ROWS, ROWS = 512, (1024, 2048)  # n: the larger one where a product then takes under PRODUCT_S
PRODUCT_S = 0.05
COPY_MIB = 64  # past the caches of one core, as features are


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.T)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


LIBRARIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch.mm": _mm, "oneDNN": _onednn}


class Ceiling:
    """GFLOP/s of the fastest products of one dtype: library -> one rate a round."""

    def __init__(self, dtype: str, d: int) -> None:
        self.d = d
        self.rates: dict[str, list[float]] = {}
        self.shapes: dict[str, tuple[Tensor, Tensor]] = {}
        trial = {name: self._trial(name, dtype) for name in LIBRARIES}
        best = max(max(rates, default=0.0) for rates in trial.values())
        for name, rates in trial.items():
            # A library without kernels for a dtype can be 100 times slower: not a ceiling, and too slow to keep trying.
            if rates and max(rates) > best / 4:
                small, large = ROWS
                rows = large if 2 * large**2 * d / max(rates) / 1e9 < PRODUCT_S else small
                flat, square = _operands(rows, d, dtype)
                self.shapes[name] = max((flat, square), key=lambda ab, name=name: _rate(name, *ab, repeats=3))
                self.rates[name] = []

    def _trial(self, name: str, dtype: str) -> list[float]:
        try:
            return [_rate(name, a, b, repeats=3) for a, b in _operands(TRIAL_ROWS, self.d, dtype)]
        except RuntimeError:
            return []  # oneDNN has no bf16 product on this instruction set

    def sample(self) -> None:
        """One product of each library, the better of two runs."""
        for name, (a, b) in self.shapes.items():
            self.rates[name].append(_rate(name, a, b, repeats=2))


def bandwidth() -> float:
    """GB/s of a copy that no cache holds, bytes read and bytes written together."""
    source = torch.ones(COPY_MIB * 2**18)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * COPY_MIB * 2**20 / fastest / 1e9


def _operands(n: int, d: int, dtype: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(A, B) of A B^T for both kinds of product."""
    tall, square = torch.randn(n, d).to(DTYPES[dtype]), torch.randn(n, n).to(DTYPES[dtype])
    return (tall, tall.clone()), (square, tall.T.contiguous())


def _rate(name: str, a: Tensor, b: Tensor, repeats: int) -> float:
    """GFLOP/s, the best of a few runs after one that does not count."""
    multiply = LIBRARIES[name]
    multiply(a, b)
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a, b)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * a.shape[0] * a.shape[1] * b.shape[0] / fastest / 1e9
