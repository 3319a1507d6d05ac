"""Sums that do not fit one range: total * exp(shift), with a shift of its own for each entry."""

from typing import NamedTuple

import torch
from torch import Tensor

# Shifts this close are lifted to the largest, so that one exp serves a row and its column in backward. The sums are
# at least 1e-25 before, and still normal float32 numbers after it.
NEAR = 8.0


class Scaled(NamedTuple):
    """total * exp(shift), both [n]."""

    total: Tensor
    shift: Tensor


def join(*parts: Scaled) -> Scaled:
    """The sum of the parts, under the largest shift among those that hold anything."""
    if len(parts) == 1:
        return parts[0]
    totals, shifts = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    top = torch.where(totals > 0, shifts, -torch.inf).amax(0)
    top = torch.where(top == -torch.inf, shifts.amax(0), top)
    terms = torch.where(totals == 0, 0.0, totals * torch.exp(shifts - top))
    return Scaled(terms.sum(0), top)


def lift(row: Scaled, col: Scaled) -> tuple[Scaled, Scaled]:
    """Upstream gradients of sums, for one shift everywhere where none is further than NEAR from the largest.

    The gradient of a sum under shift c is exp(c' - c) times as large under c'.
    """
    top = torch.maximum(row.shift.max(), col.shift.max())
    near = top - torch.minimum(row.shift.min(), col.shift.min()) <= NEAR
    return tuple(
        Scaled(
            torch.where(near, part.total * torch.exp(top - part.shift), part.total),
            torch.where(near, top, part.shift),
        )
        for part in (row, col)
    )
