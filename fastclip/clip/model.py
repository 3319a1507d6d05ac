"""The pair of towers and the temperature between them."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastclip.clip.causal import CausalTextTower
from fastclip.clip.cbow import CbowTower
from fastclip.clip.config import (
    CausalTextConfig,
    CbowConfig,
    ClipConfig,
    ConvConfig,
    ResNetConfig,
    TextConfig,
    VitConfig,
)
from fastclip.clip.convnet import ConvTower
from fastclip.clip.resnet import ModifiedResNet
from fastclip.clip.text import TextTower
from fastclip.clip.vit import VisionTransformer

TOWERS: dict[type, type[nn.Module]] = {
    ConvConfig: ConvTower,
    ResNetConfig: ModifiedResNet,
    VitConfig: VisionTransformer,
    TextConfig: TextTower,
    CausalTextConfig: CausalTextTower,
    CbowConfig: CbowTower,
}


class Clip(nn.Module):
    """Images [N, C, S, S] float32 and token ids [N, L] int64 -> features [N, D], not normalised."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.image = TOWERS[type(config.image)](config.image, config.embed_dim)
        self.text = TOWERS[type(config.text)](config.text, config.embed_dim)
        # The logarithm of the multiplier, as in CLIP: steps on it are relative, and it stays positive.
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))
        # Only models for siglip_loss have one.
        self.logit_bias = None if config.init_bias is None else nn.Parameter(torch.tensor(float(config.init_bias)))

    @property
    def logit_scale(self) -> torch.Tensor:
        """The multiplier of the cosines, 0-d."""
        return self.log_scale.exp()

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images, normalised as the model was trained (the glyph model: ink 1 on 0) -> features [N, D]."""
        return self.image(images)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [N, L] int64, L at most the context, 0 = padding -> features [N, D]."""
        return self.text(ids)

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(image features [N, D], text features [N, D], logit scale 0-d): clip_loss's arguments, in order."""
        return self.encode_image(images), self.encode_text(ids), self.logit_scale

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep each block's input only, and compute the rest again in backward: less memory, a third more work."""
        self.image.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    @torch.no_grad()
    def clamp_scale(self, highest: float = 100.0) -> None:
        """Keep the logit scale in [1, highest]: call after each step (CLIP, section 2.5)."""
        self.log_scale.clamp_(0.0, math.log(highest))
