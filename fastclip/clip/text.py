"""A text transformer: token ids [N, L] int64, 0 = padding -> embedding [N, D].

Blocks are pre-normalised (Radford et al., arXiv 2103.00020, section 2.4), attention looks both ways, and a
caption is the mean of its tokens. Lengths differ, so all but attention runs on the T real tokens, packed.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastclip.clip import recompute
from fastclip.clip.config import TextConfig
from fastclip.clip.inputs import check_ids


class Block(nn.Module):
    """x [T, W] + attention, then + MLP."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, real: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        x = x + self.project(self.attend(self.query_key_value(self.norm_attention(x)), real, slots))
        return x + self.mlp(self.norm_mlp(x))

    def attend(self, packed: torch.Tensor, real: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """packed [T, 3 W] -> [T, W]. Where the tokens are: `real` bool [N, L]; `slots` int64 [T], flat."""
        n, length = real.shape
        padded = packed.new_zeros(n * length, packed.shape[1]).index_copy(0, slots, packed)
        query, key, value = padded.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None, :])
        return mixed.transpose(1, 2).reshape(n * length, -1).index_select(0, slots)


class TextTower(nn.Module):
    """Token ids -> features before normalisation. A caption without tokens is one padding token."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.context = config.context
        self.recomputed = False
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.head_width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, embed_dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.01)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input, and compute the rest again in backward."""
        self.recomputed = enable

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        check_ids(ids, self.context)
        real = ids != 0
        # Every caption keeps one token, or its attention row would be all masked: NaN.
        real[:, 0] = True
        slots = real.flatten().nonzero().squeeze(1)
        row, column = slots // ids.shape[1], slots % ids.shape[1]
        x = self.tokens(ids.flatten()[slots]) + self.positions(column)
        for block in self.blocks:
            x = recompute.call(block, x, real, slots, recomputed=self.recomputed)
        x = self.norm(x)
        total = x.new_zeros(len(ids), x.shape[1]).index_add(0, row, x)
        return self.project(total / real.sum(1, keepdim=True))
