"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastclip import clip_loss
from fastclip.clip.model import Clip
from fastclip.errors import UserError
from fastclip.train.config import TrainConfig

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class History:
    """One entry a step; `accuracy` every few steps only, as (step, accuracy). `seconds`: the whole time."""

    loss: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def train(
    model: Clip,
    draw: Callable[[], Batch],
    config: TrainConfig,
    report: Callable[[History], None] = lambda history: None,
) -> History:
    """Train `model` in place on `config.steps` batches from `draw()`: images [N, C, S, S], token ids [N, L].

    `report` is called after each step. The first Ctrl-C ends the loop after the step in progress; a second
    raises KeyboardInterrupt. UserError when the loss is not finite.
    """
    optimizer = make_optimizer(model, config)
    history = History()
    began = time.perf_counter()
    model.train()
    with stop_on_interrupt() as interrupted:
        for step in range(config.steps):
            set_learning_rate(optimizer, learning_rate(step, config))
            images, ids = draw()
            wanted = step % config.stats_every == 0 or step == config.steps - 1
            result = clip_loss(*model(images, ids), return_stats=wanted)
            loss, stats = result if wanted else (result, None)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the loss became {loss.item()} at step {step + 1} "
                    f"(logit scale {model.logit_scale.item():.1f}); lower the learning rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            model.clamp_scale(config.highest_scale)

            history.loss.append(loss.item())
            history.scale.append(model.logit_scale.item())
            if stats is not None:
                accuracy = 0.5 * (stats.image_accuracy + stats.text_accuracy)
                history.accuracy.append((step, accuracy.item()))
            history.seconds = time.perf_counter() - began
            report(history)
            if interrupted():
                history.interrupted = True
                break
    return history


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over the first `warmup` of the steps, then half a cosine down to zero."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def make_optimizer(model: Clip, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; only matrices and kernels decay. Each group's `factor` multiplies the learning rate."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1 and p is not model.log_scale]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
        {"params": [model.log_scale], "weight_decay": 0.0, "factor": config.scale_rate},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, a first SIGINT only makes the given function answer True; a second raises KeyboardInterrupt."""
    seen = False

    def handle(number: int, frame: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: signals are not ours to take
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
