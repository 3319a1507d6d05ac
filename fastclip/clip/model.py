"""The pair of towers and the temperature between them."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastclip.clip.config import ClipConfig
from fastclip.clip.convnet import ConvTower
from fastclip.clip.text import TextTower


class Clip(nn.Module):
    """Images [N, C, S, S] float32 and token ids [N, L] int64 -> features [N, D], not normalised."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ConvTower(config.image, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim)
        # The logarithm of the multiplier, as in CLIP: steps on it are relative, and it stays positive.
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))

    @property
    def logit_scale(self) -> torch.Tensor:
        """The multiplier of the cosines, 0-d."""
        return self.log_scale.exp()

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.image(images)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return self.text(ids)

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(image features [N, D], text features [N, D], logit scale 0-d): clip_loss's arguments, in order."""
        return self.encode_image(images), self.encode_text(ids), self.logit_scale

    @torch.no_grad()
    def clamp_scale(self, highest: float = 100.0) -> None:
        """Keep the logit scale in [1, highest]: call after each step (CLIP, section 2.5)."""
        self.log_scale.clamp_(0.0, math.log(highest))
