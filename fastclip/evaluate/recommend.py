"""Recommendation by nearest neighbours: items like those that someone liked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fastclip.errors import UserError
from fastclip.metrics import topk


def similar(features: torch.Tensor, liked: Sequence[int], top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines float32 [top], rows int64 [top]) of the items closest to the mean of the `liked` rows, best first.

    features: [M, D], pictures, texts or both. The liked ones are left out; `top` is cut to what remains. UserError if
    nothing is liked or nothing remains.
    """
    liked = sorted(set(liked))
    top = min(top, len(features) - len(liked))
    if not liked or top < 1:
        raise UserError(f"{len(liked)} of {len(features)} items are liked: at least one must be, and one be left")
    query = F.normalize(features[liked].float(), dim=1).mean(0, keepdim=True)
    scores, rows = topk(query, features, top + len(liked))
    new = ~torch.isin(rows[0], torch.tensor(liked))
    return scores[0][new][:top], rows[0][new][:top]
