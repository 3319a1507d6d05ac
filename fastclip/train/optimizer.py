"""AdamW with the paper's exclusions, and an average of the weights."""

from __future__ import annotations

import torch
from torch import nn

from fastclip.clip.config import VitConfig
from fastclip.clip.model import Clip
from fastclip.train.config import OptimizerConfig

# Radford et al., arXiv 2103.00020, table 18: (betas, eps).
VISION_TRANSFORMER = ((0.9, 0.98), 1e-6)
OTHER = ((0.9, 0.999), 1e-8)
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def make_optimizer(model: Clip, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained; only matrices and kernels decay. A group has `factor` learning rates.

    The logit scale and bias are a group of their own: FSDP2 does not shard them, and one fused step cannot mix sharded
    and whole tensors.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "factor": 1.0},
        {"params": [p for p in trained if p.ndim == 0], "weight_decay": 0.0, "factor": config.scale_rate},
    ]
    betas, eps = VISION_TRANSFORMER if isinstance(model.config.image, VitConfig) else OTHER
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas or betas,
        eps=eps if config.eps is None else config.eps,
        fused=model.log_scale.device.type in FUSED_DEVICES,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def allocate_moments(optimizer: torch.optim.AdamW) -> None:
    """Zero moments for every parameter, as AdamW itself makes them at its first step: a place to load them into."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


class Average:
    """An exponential moving average of a model's trained parameters (Polyak and Juditsky, 1992), in float32.

    `weights`: parameter name -> average. Buffers are not averaged: BatchNorm's are averages already.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After each optimiser step."""
        for name, p in self.parameters.items():
            self.weights[name].lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and their average; a second call puts them back."""
        for name, p in self.parameters.items():
            kept = p.detach().clone()
            p.copy_(self.weights[name])
            self.weights[name].copy_(kept)
