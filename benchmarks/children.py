"""Functions in processes of their own: for peak memory, for runs that do not share one process's luck, and so that a
peer which dies takes nothing else with it."""

import ctypes
import multiprocessing
import platform
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3  # <malloc.h>: blocks of at least this size are mapped, and unmapped when freed


class ChildError(Exception):
    """What was asked of a child failed or ended it; the message says how, in one line."""


def run_in_child(function: Callable, *arguments: object, threads: int) -> object:
    """function(*arguments) in a fresh process with this many threads. Raises ChildError with the reason."""
    receiver, sender = _context().Pipe(duplex=False)
    child = _context().Process(target=_child, args=(sender, function, arguments, threads))
    child.start()
    sender.close()
    try:
        done, value = receiver.recv()
    except EOFError:
        child.join()
        raise ChildError(f"its process ended with code {child.exitcode}; -9 means out of memory") from None
    except KeyboardInterrupt:
        child.terminate()
        raise
    finally:
        child.join()
    if not done:
        raise ChildError(value)
    return value


def _child(sender: Connection, function: Callable, arguments: tuple, threads: int) -> None:
    _die_first()
    torch.set_num_threads(threads)
    try:
        sender.send((True, function(*arguments)))
    except (RuntimeError, MemoryError, ImportError, TypeError, ValueError) as error:
        said = str(error).strip().splitlines() or [""]
        sender.send((False, f"{type(error).__name__}: {said[0]}"))


@cache
def _context():
    """Children are forked from a server that has imported torch and never used it, and so start in milliseconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastclip.benchmarks.cases"])
    return context


def _die_first() -> None:
    """If memory runs out, the kernel ends this process and not its parent."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return


def return_freed_blocks() -> None:
    """Has glibc give back every freed block of a MiB or more: memory that stays in the heap would be taken for live."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
