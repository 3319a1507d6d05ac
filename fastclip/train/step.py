"""One optimiser step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastclip import clip_loss, retrieval_ranks, siglip_loss
from fastclip.data.batch import Batch
from fastclip.distributed import Sharded
from fastclip.errors import UserError
from fastclip.train.config import TrainConfig
from fastclip.train.optimizer import set_learning_rate
from fastclip.train.parallel import World, gradient_norm
from fastclip.train.schedule import Schedule
from fastclip.train.state import TrainState
from fastclip.train.towers import Encode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What one step showed. `scale` is the logit scale after it; `clamped` whether it had to be pulled back;
    `gradient_norm` is that before clipping; `accuracy` in [0, 1], where it was asked for."""

    loss: float
    accuracy: float | None
    gradient_norm: float
    learning_rate: float
    scale: float
    clamped: bool
    skipped: bool


class TrainStep:
    """Callable: a batch of this process's pairs -> StepResult, with `state` one step further."""

    def __init__(
        self, state: TrainState, encode: Encode, schedule: Schedule, config: TrainConfig, world: World
    ) -> None:
        self.state, self.encode, self.schedule, self.config, self.world = state, encode, schedule, config, world
        self.parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        self.scalars = [p for p in self.parameters if p.ndim == 0]

    def __call__(self, batch: Batch, *, accuracy: bool = False) -> StepResult:
        state, model, optimizer, scaler = self.state, self.state.model, self.state.optimizer, self.state.scaler
        rate = self.config.optimizer.learning_rate * self.schedule(state.step)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        loss, share = self.loss(batch, accuracy)
        scaler.scale(loss).backward()
        self.world.average(p.grad for p in self.scalars)
        scaler.unscale_(optimizer)
        norm, value = gradient_norm(self.parameters), loss.item()

        skipped = not (math.isfinite(value) and math.isfinite(norm))
        if not skipped:
            self.clip(norm)
            scaler.step(optimizer)
        scaler.update()
        clamped = self.clamp_scale()
        state.clamped += clamped
        if state.average is not None and not skipped:
            state.average.update()
        state.step += 1
        state.samples += self.config.batch
        self.count(skipped, value, norm)
        return StepResult(value, share, norm, rate, model.logit_scale.item(), clamped, skipped)

    def training_mode(self) -> None:
        """Dropout and batch statistics on, but for a frozen image tower."""
        self.state.model.train()
        self.state.model.image.train(not self.config.model.lock_image)

    def loss(self, batch: Batch, accuracy: bool) -> tuple[torch.Tensor, float | None]:
        """The whole batch's loss, over all processes, and the in-batch accuracy if asked for."""
        model = self.state.model
        group = None if self.world.group is None else Sharded(self.world.group, self.config.loss_mode)
        ids = None if batch.pair_ids is None else batch.pair_ids.to(self.world.device)
        shared = {"ids": ids, "group": group}
        with autocast(self.config, self.world):
            image, text = self.encode(batch)
            if self.config.loss == "siglip":
                loss = siglip_loss(image, text, model.logit_scale, model.logit_bias, **shared)
                return loss, pair_accuracy(image, text) if accuracy else None
            result = clip_loss(image, text, model.logit_scale, return_stats=accuracy, **shared)
        if not accuracy:
            return result, None
        loss, stats = result
        return loss, 0.5 * (stats.image_accuracy + stats.text_accuracy).item()

    def clip(self, norm: float) -> None:
        """Shorten the gradient to the configured norm."""
        highest = self.config.optimizer.clip_norm
        if highest is not None and norm > highest:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], highest / norm)

    def clamp_scale(self) -> bool:
        """Keep the logit scale in [1, highest]; whether that changed it."""
        model, highest = self.state.model, self.config.optimizer.highest_scale
        before = model.log_scale.item()
        model.clamp_scale(highest)
        return not 0.0 <= before <= math.log(highest) + 1e-6

    def count(self, skipped: bool, loss: float, norm: float) -> None:
        """Count a skipped step. UserError when there were too many in a row."""
        state, limit = self.state, self.config.optimizer.skips
        state.skipped += skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        # While the loss scale of fp16 can still fall, an overflow is its business.
        if state.skipped_in_a_row > limit and (not math.isfinite(loss) or state.scaler.get_scale() <= 1.0):
            what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient's norm became {norm}"
            raise UserError(
                f"{what} at step {state.step} (logit scale {state.model.logit_scale.item():.1f}), "
                f"{state.skipped_in_a_row} step(s) in a row; lower the learning rate"
            )


def autocast(config: TrainConfig, world: World) -> torch.autocast:
    """The configured precision of products."""
    dtype = DTYPES[config.precision.dtype]
    return torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def pair_accuracy(image: torch.Tensor, text: torch.Tensor) -> float:
    """Share of images and texts [N, D] of this process whose own partner no other one beats."""
    return 0.5 * sum((ranks == 0).double().mean().item() for ranks in retrieval_ranks(image, text))
