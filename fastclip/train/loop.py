"""The loop: batches in, steps, and what is due after them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from fastclip.data.batch import Batch
from fastclip.train.config import TrainConfig
from fastclip.train.interrupt import interrupts
from fastclip.train.log import RunLog
from fastclip.train.step import TrainStep


def fit(
    step: TrainStep,
    batches: Iterable[Batch],
    config: TrainConfig,
    log: RunLog,
    evaluate: Callable[[], dict[str, float]] | None = None,
    save: Callable[[], object] | None = None,
) -> int:
    """Train until the schedule's last step. Returns 0, or the number of the signal that ended it before.

    The first SIGINT or SIGTERM, to any process, ends the loop in all of them after the step in progress and a
    checkpoint; a second stops at once. UserError when too many steps in a row are not finite.
    """
    state, total, world = step.state, step.schedule.steps, step.world
    stopped = 0
    step.training_mode()
    stream = endless(batches)
    with interrupts() as interrupted:
        while state.step < total and not stopped:
            began = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - began
            last = state.step + 1 == total
            result = step(batch, accuracy=last or due(state.step, config.log.accuracy_every))
            log.step(state, result, waited, last=last)

            if evaluate is not None and (last or due(state.step, config.evaluation.every)):
                log.evaluation(state, evaluate())
                step.training_mode()
            stopped = world.highest(interrupted())
            if save is not None and (last or stopped or due(state.step, config.checkpoint.every)):
                save()
    return stopped


def due(step: int, every: int) -> bool:
    """Whether `step` is one of each `every`; never for 0."""
    return every > 0 and step % every == 0


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from batches
