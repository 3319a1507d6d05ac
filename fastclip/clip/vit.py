"""The vision transformer of CLIP: images [N, C, S, S] -> features [N, D] (Dosovitskiy et al., arXiv 2010.11929).

A patch is one token, a learnt class token goes first and is what is read in the end. As in CLIP there is a layer
normalisation before the blocks too, and the projection is linear.
"""

from __future__ import annotations

import torch
from torch import nn

from fastclip.clip.config import VitConfig
from fastclip.clip.inputs import check_images
from fastclip.clip.transformer import Block, LayerNorm, run


class VisionTransformer(nn.Module):
    """Images, normalised as the model was trained -> features before normalisation."""

    def __init__(self, config: VitConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.recomputed = False
        width, patch = config.width, config.patch_size
        scale = width**-0.5
        self.patches = nn.Conv2d(config.channels, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positions = nn.Parameter(scale * torch.randn((config.image_size // patch) ** 2 + 1, width))
        self.norm_before = LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, config.head_width, config.mlp_ratio, config.quick_gelu, causal=False)
            for _ in range(config.layers)
        )
        self.norm = LayerNorm(width)
        self.project = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.project.weight, std=scale)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input, and compute the rest again in backward."""
        self.recomputed = enable

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        check_images(images, self.config.channels, self.config.image_size)
        x = self.patches(images.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        positions = self.positions.to(x.dtype)
        x = x + positions[1:]
        if self.training and self.config.patch_dropout:
            x = drop_patches(x, self.config.patch_dropout)
        first = (self.class_embedding.to(x.dtype) + positions[0]).expand(len(x), 1, -1)
        x = self.norm_before(torch.cat([first, x], dim=1))
        pooled = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        x = run(self.blocks, x, pooled, recomputed=self.recomputed)
        return self.project(self.norm(x))


def drop_patches(x: torch.Tensor, share: float) -> torch.Tensor:
    """x [N, P, W] -> [N, K, W]: each image keeps its own K = (1 - share) P random patches, one at least.

    Li et al., Scaling Language-Image Pre-training via Masking (FLIP), arXiv 2212.00794.
    """
    n, patches = x.shape[:2]
    keep = max(1, int(patches * (1 - share)))
    kept = torch.rand(n, patches, device=x.device).topk(keep, dim=1).indices
    return x[torch.arange(n, device=x.device)[:, None], kept]
