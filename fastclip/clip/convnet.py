"""A small convolutional image tower: image [N, C, S, S] -> embedding [N, D].

Each stage halves the side. The last map is flattened, not averaged: the place of a stroke matters (accents).
"""

from __future__ import annotations

import torch
from torch import nn

from fastclip.clip import recompute
from fastclip.clip.config import ConvConfig
from fastclip.clip.inputs import check_images


class ResidualBlock(nn.Module):
    """x + conv(relu(bn(conv(x)))), then relu: He et al., arXiv 1512.03385, figure 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        nn.init.zeros_(self.branch[-1].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.branch(x))


class ConvTower(nn.Module):
    """float32 images in [0, 1] -> features before normalisation."""

    def __init__(self, config: ConvConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.recomputed = False
        layers: list[nn.Module] = []
        before, side = config.channels, config.image_size
        for i, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
            # A wider window where there is one plane: 3 x 3 of one number sees too little.
            kernel = 5 if i == 0 else 3
            layers += [
                nn.Conv2d(before, width, kernel, stride=2, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                *(ResidualBlock(width) for _ in range(blocks)),
            ]
            before, side = width, (side + 1) // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(before * side * side, config.hidden, bias=False),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, embed_dim),
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the images and the last map, and compute the rest again in backward."""
        self.recomputed = enable

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        check_images(images, self.config.channels, self.config.image_size)
        x = images.contiguous(memory_format=torch.channels_last)
        return self.head(recompute.call(self.features, x, recomputed=self.recomputed))
