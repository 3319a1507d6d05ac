"""Progress of a run: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"


class Progress:
    """Call it with the step done and a text about it; a context manager.

    `begin`: steps done by an earlier run. `shown`: False in all processes but one.
    """

    def __init__(
        self,
        steps: int,
        begin: int = 0,
        shown: bool = True,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
    ) -> None:
        self.steps, self.begin, self.shown, self.every = steps, begin, shown, every_seconds
        self.stream = stream or sys.stderr
        self.bar = None
        self.printed = -float("inf")

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        if self.shown and self.stream.isatty():
            from tqdm import tqdm

            shown = {"file": self.stream, "dynamic_ncols": True, "bar_format": BAR}
            self.bar = tqdm(total=self.steps, initial=self.begin, **shown)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self.printed >= self.every or done == self.steps:
            self.printed = now
            left = (now - self.started) / max(1, done - self.begin) * (self.steps - done)
            print(f"step {done}/{self.steps} {text}, {left:.0f} s left", file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
