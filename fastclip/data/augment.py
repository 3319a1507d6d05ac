"""Random distortions of pictures, a batch at a time: images [N, 1, S, S] float32 in [0, 1], ink 1 on 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Augment:
    """Rubber-sheet and pen distortions, drawn anew for every picture.

    Standard deviations: `rotate`, `shear` in radians, `scale` of its log, `shift`, `warp` in half sides.
    `thicken`, `thin`, `coarse`: share of the pictures that get each. `noise`: highest standard deviation.
    """

    rotate: float = 0.04
    shear: float = 0.12
    scale: float = 0.07
    shift: float = 0.03
    warp: float = 0.015
    thicken: float = 0.05
    thin: float = 0.05
    coarse: float = 0.1
    noise: float = 0.05

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        n, _, size, _ = images.shape

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def chosen(share: float) -> torch.Tensor:
            return (torch.rand(n, generator=generator) < share).nonzero().squeeze(1)

        angle, shear = self.rotate * normal(n), self.shear * normal(n)
        wide, high = (self.scale * normal(2, n)).exp()
        matrix = torch.stack([angle.cos() * wide, shear - angle.sin(), angle.sin(), angle.cos() * high], 1)
        affine = torch.cat([matrix.view(n, 2, 2), self.shift * normal(n, 2, 1)], 2)
        grid = F.affine_grid(affine, [n, 1, size, size], align_corners=False)
        bend = F.interpolate(self.warp * normal(n, 2, 4, 4), (size, size), mode="bilinear", align_corners=False)
        images = F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)

        rows = chosen(self.thicken)
        images[rows] = F.max_pool2d(images[rows], 3, stride=1, padding=1)
        rows = chosen(self.thin)
        images[rows] = 0.5 * (images[rows] - F.max_pool2d(-images[rows], 3, stride=1, padding=1))
        rows = chosen(self.coarse)
        images[rows] = coarsen(images[rows])
        images += self.noise * torch.rand(n, 1, 1, 1, generator=generator) * normal(*images.shape)
        return images


def coarsen(images: torch.Tensor, factor: int = 2) -> torch.Tensor:
    """As if scanned with `factor` times fewer pixels and enlarged again."""
    small = F.avg_pool2d(images, factor)
    return F.interpolate(small, images.shape[2:], mode="bilinear", align_corners=False)
