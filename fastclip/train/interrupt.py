"""SIGINT and SIGTERM as a request to finish the step in progress."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# torchrun passes a terminal's Ctrl-C on to processes that have had it already: within this time it is the same one.
ECHO_SECONDS = 2.0


@contextmanager
def interrupts() -> Iterator[Callable[[], int]]:
    """Inside, a first SIGINT or SIGTERM only makes the given function return its number (0 before).

    A second one ends the program at once: SIGINT with KeyboardInterrupt, SIGTERM with SystemExit(143).
    """
    first, when = 0, 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first, when
        if not first:
            first, when = number, time.monotonic()
        elif time.monotonic() - when > (ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0):
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: signals are not ours to take
        yield lambda: 0
        return
    try:
        yield lambda: first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
