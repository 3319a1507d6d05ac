"""Everything that changes while a run goes on, under names that a checkpoint can hold."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastclip.clip.model import Clip
from fastclip.train.optimizer import Average, allocate_moments


@dataclass
class TrainState:
    """Model, optimiser and counters.

    `samples`: pairs trained on, over all processes. `skipped`: steps without an update, because the loss or the
    gradient was not finite; `skipped_in_a_row`: the last of them. `clamped`: steps after which the logit scale was
    pulled back.
    """

    model: Clip
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    average: Average | None = None
    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    clamped: int = 0

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's live tensors: parameters and buffers."""
        return self.model.state_dict()

    def moments(self) -> dict[str, torch.Tensor]:
        """The live tensors of the optimiser and of the average of the weights."""
        allocate_moments(self.optimizer)
        named = {}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{name}.{key}"] = tensor
        if self.average is not None:
            named |= {f"ema.{name}": tensor for name, tensor in self.average.weights.items()}
        return named

    def counters(self) -> dict[str, Any]:
        """Plain numbers, the same in every process."""
        names = ("step", "samples", "skipped", "skipped_in_a_row", "clamped")
        return {**{name: getattr(self, name) for name in names}, "scaler": self.scaler.state_dict()}

    def load_counters(self, values: dict[str, Any]) -> None:
        values = dict(values)
        if scaler := values.pop("scaler"):
            self.scaler.load_state_dict(scaler)
        for name, value in values.items():
            setattr(self, name, value)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators; weights_only-loadable."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of random_state."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int, rank: int) -> None:
    """Seed the three global generators; each process draws its own dropout and distortions."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)
