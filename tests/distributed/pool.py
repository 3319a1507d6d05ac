"""Processes that stay, to run functions as the ranks of gloo groups: starting them takes longer than most tests.

A server process imports torch once and forks the ranks from it, which then start within a tenth of a second.
"""

import datetime
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "fastclip", "rank_cases"])
TIMEOUT = datetime.timedelta(seconds=90)  # what a rank waits for another; on a busy machine some are slow


class Pool:
    """`ranks` processes in one gloo group, with subgroups of the first W for each smaller W, and of the odd ones."""

    def __init__(self, ranks: int) -> None:
        folder = tempfile.TemporaryDirectory()
        self.folder, self.processes, self.pipes = folder, [], []
        for rank in range(ranks):
            here, there = CONTEXT.Pipe()
            args = (rank, ranks, str(Path(folder.name) / "store"), there)
            process = CONTEXT.Process(target=serve, args=args, daemon=True)
            process.start()
            there.close()  # so that a process that dies is seen to have closed it
            self.processes.append(process)
            self.pipes.append(here)

    def run(self, function: Callable, *args: object, world: int | str | None = None, seconds: float = 240.0) -> list:
        """function(rank, group, *args) on the first `world` ranks, or those of the group "odd": what each returns.

        Raises RuntimeError with the tracebacks where it raised.
        """
        used = self.pipes[1::2] if world == "odd" else self.pipes[:world]
        for rank, pipe in enumerate(used):
            pipe.send((function, rank, "odd" if world == "odd" else len(used), args))
        deadline, results = time.monotonic() + seconds, []
        for rank, pipe in enumerate(used):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {seconds} s")
            results.append(pipe.recv())
        errors = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(results) if not ok]
        if errors:
            raise RuntimeError("\n".join(errors))
        return [value for _, value in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def serve(rank: int, ranks: int, store: str, pipe) -> None:
    """What each process does: takes a function from the pipe, runs it, sends its result or its traceback."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=TIMEOUT)
    groups = {w: dist.new_group(list(range(w)), timeout=TIMEOUT) for w in range(1, ranks)}
    groups |= {ranks: dist.group.WORLD, "odd": dist.new_group(list(range(1, ranks, 2)), timeout=TIMEOUT)}
    while True:
        function, rank, world, args = pipe.recv()
        try:
            pipe.send((True, function(rank, groups[world], *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
