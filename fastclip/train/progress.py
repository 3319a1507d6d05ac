"""Progress of a run: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from fastclip.train.trainer import History

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"


class Progress:
    """Call it with the History after each step; use as a context manager."""

    def __init__(self, steps: int, batch: int, stream: TextIO | None = None, every_seconds: float = 5.0) -> None:
        self.steps, self.batch, self.every = steps, batch, every_seconds
        self.stream = stream or sys.stderr
        self.bar = None
        self.printed = -float("inf")

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.steps, file=self.stream, dynamic_ncols=True, bar_format=BAR)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, history: History) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(self.describe(history), refresh=False)
            self.bar.update()
            return
        now, done = time.monotonic(), len(history.loss)
        if now - self.printed >= self.every or done == self.steps:
            self.printed = now
            left = history.seconds / done * (self.steps - done)
            print(
                f"step {done}/{self.steps} {self.describe(history)}, {left:.0f} s left",
                file=self.stream,
                flush=True,
            )

    def describe(self, history: History) -> str:
        accuracy = history.accuracy[-1][1] if history.accuracy else 0.0
        speed = len(history.loss) * self.batch / history.seconds
        return (
            f"loss {history.loss[-1]:.3f}, scale {history.scale[-1]:.1f}, accuracy {accuracy:.0%}, "
            f"{speed:,.0f} samples/s"
        )
