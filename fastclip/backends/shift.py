"""The shift that keeps every sum in range, and the test for when it may have lost something (math.md, eq. 7)."""

import math

import torch
from torch import Tensor

SAFE_EXPONENT = 60.0  # every sum stays below e^60, and 1 / (N sum) stays a normal float32
TINY_SUM = 1e-25  # below this a sum may have lost negatives to underflow: take the exact path


def fixed_shift(bound: float, rows: int, cols: int) -> float:
    """max(0, |bound| + log max(N, M) - 60) as a multiple of 1/16; bound: at least as large as every |S_ij|.

    Infinite beyond float32, which sends the sums to the exact path; NaN stays NaN.
    """
    shift = abs(bound) + (math.log(max(rows, cols)) - SAFE_EXPONENT)
    if shift > torch.finfo(torch.float32).max:
        return math.inf
    return shift if math.isnan(shift) else math.ceil(max(0.0, shift) * 16.0) / 16.0


def rounded_up(shift: Tensor) -> Tensor:
    """To a multiple of 1/16, so that shift + n log 2 can be formed exactly (csrc/cpu/simd.h)."""
    return torch.ceil(shift * 16.0) / 16.0


def needs_exact_path(row_sum: Tensor, col_sum: Tensor) -> bool:
    """Whether a sum left the range where a fixed shift loses nothing; a host synchronisation on a GPU."""
    return any(not bool(((total >= TINY_SUM) & total.isfinite()).all()) for total in (row_sum, col_sum))


def is_one_shift(row_shift: Tensor, col_shift: Tensor) -> bool:
    """Whether every row and column has the same shift, so that one exp serves both sums."""
    return bool((row_shift == row_shift[0]).all() and (col_shift == row_shift[0]).all())


def finite_or_zero(shift: Tensor) -> Tensor:
    """A row or column without negatives has the maximum -inf: any shift serves it."""
    return rounded_up(torch.where(shift == -torch.inf, 0.0, shift))
