"""A bag of words as text tower: token ids [N, L] int64, 0 = padding -> features [N, D].

The mean of the embeddings of the tokens that are not padding (the CBOW of Mikolov et al., arXiv 1301.3781), projected
linearly. Blind to word order; of almost no cost beside an image tower.
"""

from __future__ import annotations

import torch
from torch import nn

from fastclip.clip.config import CbowConfig
from fastclip.clip.inputs import check_ids


class CbowTower(nn.Module):
    """Token ids -> features before normalisation. A caption without tokens has features of zero."""

    def __init__(self, config: CbowConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.EmbeddingBag(config.vocabulary, config.width, mode="mean", padding_idx=0)
        self.project = nn.Linear(config.width, embed_dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.project.weight, std=config.width**-0.5)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Changes nothing: there are no inner activations to compute again."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        check_ids(ids, self.config.context)
        return self.project(self.tokens(ids))
