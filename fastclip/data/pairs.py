"""Batches of pairs in which no caption comes twice, so that every off-diagonal pair is a true negative."""

from __future__ import annotations

import numpy as np
import torch

from fastclip.data.glyphs import Glyphs


class UniqueCaptions:
    """Draws `batch` different names, then for each one of its pictures.

    A name drawn by f faces has weight f: over time every picture is drawn about as often as any other.
    ValueError if there are fewer names than `batch`.
    """

    def __init__(self, glyphs: Glyphs, batch: int, seed: int) -> None:
        count = torch.from_numpy(np.bincount(glyphs.name_of, minlength=len(glyphs.names)))
        available = int((count > 0).sum())
        if batch > available:
            raise ValueError(f"a batch of {batch} unique captions needs as many names, got {available}")
        self.batch = batch
        self.images = torch.from_numpy(glyphs.images)
        self.count = count
        # Pictures sorted by name: those of name k are by_name[first[k] : first[k] + count[k]].
        self.by_name = torch.from_numpy(np.argsort(glyphs.name_of, kind="stable"))
        self.first = count.cumsum(0) - count
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(images float32 [N, 1, S, S] in [0, 1], name numbers int64 [N])."""
        names = torch.multinomial(self.count.double(), self.batch, generator=self.generator)
        which = torch.rand(self.batch, generator=self.generator) * self.count[names]
        return to_float(self.images[self.by_name[self.first[names] + which.long()]]), names


def to_float(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 [N, S, S] -> float32 [N, 1, S, S] in [0, 1]."""
    return torch.as_tensor(images)[:, None].float() / 255
