"""The text transformer of CLIP: token ids [N, L] int64 -> features [N, D].

A token sees itself and those before it, and a caption's features are those of its end token (Radford et al.,
arXiv 2103.00020, section 2.4). What comes after the end token therefore changes nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from fastclip.clip.config import CausalTextConfig
from fastclip.clip.inputs import check_ids
from fastclip.clip.transformer import Block, LayerNorm, init_blocks, run


class CausalTextTower(nn.Module):
    """Token ids, L at most the context -> features before normalisation."""

    def __init__(self, config: CausalTextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.recomputed = False
        width = config.width
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Parameter(torch.empty(config.context, width))
        self.blocks = nn.ModuleList(
            Block(width, config.head_width, config.mlp_ratio, config.quick_gelu, causal=True)
            for _ in range(config.layers)
        )
        self.norm = LayerNorm(width)
        self.project = nn.Linear(width, embed_dim, bias=False)
        # OpenAI's CLIP, `initialize_parameters` of clip/model.py.
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.project.weight, std=width**-0.5)
        init_blocks(self.blocks, width)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input, and compute the rest again in backward."""
        self.recomputed = enable

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        check_ids(ids, self.config.context)
        ids, end = trimmed(ids, end_of_text(ids, self.config.end_token))
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        return self.project(self.norm(run(self.blocks, x, end, recomputed=self.recomputed)))


def end_of_text(ids: torch.Tensor, end_token: int | None) -> torch.Tensor:
    """ids [N, L] -> [N] int64: the place of the first `end_token`, or of the highest id if None (as in CLIP)."""
    return (ids if end_token is None else (ids == end_token).int()).argmax(dim=1)


def trimmed(ids: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the columns after the batch's last end token.

    On an accelerator the length would have to come back to the host first, and a compiled graph has one
    length: there nothing is cut, and the features are the same.
    """
    if len(ids) == 0 or not ids.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return ids, end
    return ids[:, : int(end.max()) + 1], end
