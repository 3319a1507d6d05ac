"""The transformer block of CLIP's towers: pre-normalised (Radford et al., arXiv 2103.00020, sections 2.4 and 2.5).

    x         [N, L, W]  the residual stream          pooled  [N] int64  the token each tower reads in the end

Only one token a row leaves the last block, so only that one goes through its output projection and its MLP.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastclip.clip import recompute


class LayerNorm(nn.LayerNorm):
    """Computed in float32 under autocast, and handed back in the dtype it came in: the stream stays narrow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x): the approximation of GELU that OpenAI's models were trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The same function through SiLU, which keeps one tensor for backward where the product keeps two.
        return F.silu(1.702 * x) / 1.702


class Block(nn.Module):
    """x [N, L, W] + attention, then + MLP."""

    def __init__(self, width: int, head_width: int, mlp_ratio: float, quick_gelu: bool, causal: bool) -> None:
        super().__init__()
        self.heads = width // head_width
        self.causal = causal
        hidden = round(mlp_ratio * width)
        self.norm_attention = LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = LayerNorm(width)
        activation = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))
        # As nn.MultiheadAttention begins, which is what OpenAI's image transformer keeps.
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: torch.Tensor, pooled: torch.Tensor | None = None) -> torch.Tensor:
        """[N, L, W], or with `pooled` [N, W]: the token pooled[i] of row i, and no other."""
        packed = self.query_key_value(self.norm_attention(x))
        query, key, value = packed.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if pooled is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
            x = x + self.project(mixed.transpose(1, 2).flatten(2))
        else:
            row = torch.arange(len(x), device=x.device)
            query = query[row, :, pooled].unsqueeze(2)
            seen = torch.arange(x.shape[1], device=x.device) <= pooled[:, None] if self.causal else None
            mask = None if seen is None else seen[:, None, None, :]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = x[row, pooled] + self.project(mixed.flatten(1))
        return x + self.mlp(self.norm_mlp(x))


def run(blocks: nn.ModuleList, x: torch.Tensor, pooled: torch.Tensor, *, recomputed: bool) -> torch.Tensor:
    """x [N, L, W] through all blocks -> [N, W], row i's token pooled[i]."""
    for block in blocks[:-1]:
        x = recompute.call(block, x, recomputed=recomputed)
    return recompute.call(blocks[-1], x, pooled, recomputed=recomputed)


def init_blocks(blocks: nn.ModuleList, width: int) -> None:
    """The text transformer's initial weights: OpenAI's CLIP, `initialize_parameters` of clip/model.py.

    Projections that add to the residual stream start smaller the deeper the stack.
    """
    into_stream = width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        nn.init.normal_(block.query_key_value.weight, std=width**-0.5)
        nn.init.normal_(block.project.weight, std=into_stream)
        nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp[2].weight, std=into_stream)
