"""What is planned: the model, the batch and how it is spread."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from fastclip.clip.config import ClipConfig
from fastclip.clip.model import Clip
from fastclip.plan.towers import TowerCost, tower_cost

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Setting:
    """One way to run a training step. `batch` over all `gpus`; `micro_batch` None keeps all activations."""

    model: ClipConfig
    batch: int
    gpus: int = 1
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    micro_batch: int | None = None
    recompute: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    loss_mode: Literal["gather", "ring"] = "gather"
    on_cpu: bool = False

    @property
    def rows(self) -> int:
        """Pairs of one GPU, of the one that has most."""
        return -(-self.batch // self.gpus)

    @property
    def pieces(self) -> int:
        """Micro-batches of one GPU."""
        return 1 if self.micro_batch is None else -(-self.rows // self.micro_batch)

    @property
    def number(self) -> int:
        """Bytes of a feature or an activation."""
        return BYTES[self.dtype]

    @cached_property
    def towers(self) -> tuple[TowerCost, TowerCost]:
        """Of the image and the text, one sample."""
        config = self.model
        return tuple(
            tower_cost(tower, config.embed_dim, self.number, self.recompute) for tower in (config.image, config.text)
        )

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Numbers of weights of the image and the text tower."""
        with torch.device("meta"):
            model = Clip(self.model)
        return tuple(sum(p.numel() for p in tower.parameters()) for tower in (model.image, model.text))
