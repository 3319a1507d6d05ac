"""How many steps, and the learning rate at each: a function of the step alone, so that a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastclip.errors import UserError
from fastclip.train.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, as a share of the highest: call it with the step, counted from 0."""

    steps: int
    warmup: int

    def __call__(self, step: int) -> float:
        """Linear over the first `warmup` steps, then half a cosine down to zero (arXiv 2103.00020, section 2.5)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def make_schedule(config: ScheduleConfig, batch: int, steps_per_epoch: int | None) -> Schedule:
    """Of steps, epochs or samples, whichever is given, else one epoch. `batch` pairs a step, over all processes.

    `steps_per_epoch`: None if unknown. UserError for a length that is unknown or less than a step.
    """
    if config.steps is not None:
        steps = config.steps
    elif config.samples is not None:
        steps = config.samples // batch
        if steps < 1:
            raise UserError(f"--schedule.samples {config.samples} are less than one batch of {batch}")
    elif steps_per_epoch is None:
        raise UserError("the length of an epoch is unknown for this data: give --schedule.steps or .samples")
    else:
        steps = max(1, round((config.epochs or 1.0) * steps_per_epoch))
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    return Schedule(steps, max(1, round(warmup)))
