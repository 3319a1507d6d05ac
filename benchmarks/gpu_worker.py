"""The process that holds the GPU. An illegal access ends all CUDA work of a process, and a kernel may never end: then
that process is ended, and the next task has a new one."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch

from fastclip.benchmarks.gpu_losses import one_line


class WorkerDiedError(Exception):
    """The process ended, hung or lost its GPU; the message says which. trying: what it had said it would try next."""

    def __init__(self, reason: str, trying: str) -> None:
        super().__init__(reason)
        self.trying = trying


class Worker:
    """Starts a process when there is something to run, and again after one has died."""

    def __init__(self) -> None:
        self._process, self._connection = None, None

    def run(self, task: Callable[..., Iterator[dict]], *arguments: object, step_s: float, until: float) -> list[dict]:
        """What task(*arguments) yields in the process, without its {"trying": ...}.

        step_s: seconds allowed between two of its messages. until: time.monotonic() at which all must have ended.
        Raises WorkerDiedError, or RuntimeError with what the task raised.
        """
        if self._process is None:
            self._start()
        rows, trying = [], ""
        try:
            self._connection.send((task, arguments))
            while True:
                patience = max(0.0, min(step_s, until - time.monotonic()))
                if not self._connection.poll(patience):
                    raise TimeoutError(f"it was ended after {patience:.0f} s without a result")
                kind, content = self._connection.recv()
                if kind == "done":
                    return rows
                if kind == "failed":
                    raise RuntimeError(content)
                if kind == "dead":
                    raise OSError(content)
                if "trying" in content:
                    trying = content["trying"]
                else:
                    rows.append(content)
        except (EOFError, OSError, KeyboardInterrupt) as error:
            code = self.close()
            if isinstance(error, KeyboardInterrupt):
                raise
            raise WorkerDiedError(str(error) or f"its process ended with code {code}", trying) from None

    def close(self) -> int | None:
        """Ends the process, if there is one. Its exit code, if it had ended by itself."""
        if self._process is None:
            return None
        self._process.join(timeout=1)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        self._connection.close()
        self._process, self._connection = None, None
        return code

    def _start(self) -> None:
        # CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()


def _serve(connection: Connection) -> None:
    while True:
        try:
            task, arguments = connection.recv()
        except EOFError:
            return
        try:
            for row in task(*arguments):
                _check_device()
                connection.send(("row", row))
            connection.send(("done", None))
        except Exception as error:
            reason = one_line(error)
            try:
                _check_device()
            except Exception:
                connection.send(("dead", reason))
                return
            connection.send(("failed", reason))


def _check_device() -> None:
    """Raises the error of an earlier kernel, after which this process can run no other."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
