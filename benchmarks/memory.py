"""Peak memory of one case, in a process of its own.

The child has glibc give every freed block of a MiB or more back at once (mallopt), since memory that stays in the
heap would be taken for live. It builds the batch, runs a small problem (libraries, threads, their buffers) and, where
the peer compiles, the problem itself once; it then resets the kernel's high-water mark of resident memory (VmHWM, by
/proc/self/clear_refs), makes one call and reads the mark again. Peak = mark - resident memory before the call - the
gradients' own size, so: what the call needs above its inputs and its results. Without /proc (or where the mark cannot
be reset) the difference of ru_maxrss is used, which cannot see a peak below that of start-up: `method` says which it
was. The call's result is checked in the child, before the parent times anything.
"""

import ctypes
import multiprocessing
import os
import platform
import resource
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.measure import make_call, seconds
from benchmarks.peers import PEERS
from benchmarks.problems import TRAINING, Problem
from benchmarks.truth import Truth, errors

WARM_UP_ROWS = 256
M_MMAP_THRESHOLD = -3  # <malloc.h>: blocks of at least this size are mapped, and unmapped when freed


@dataclass(frozen=True)
class ChildResult:
    """peak_mib above inputs and gradients; error as truth.errors; seconds of the one call; or what went wrong."""

    peak_mib: float = 0.0
    method: str = ""
    seconds: float = 0.0
    error: dict[str, float] | None = None
    failure: str | None = None


def run_in_child(peer: str, problem: Problem, mode: str, expected: Truth, threads: int) -> ChildResult:
    """One call of `peer` in a fresh process; a child that dies is a result with a `failure`."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, peer, problem, mode, expected, threads))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        return ChildResult(failure=f"its process ended with code {child.exitcode}; -9 means out of memory")
    finally:
        child.join()


def available_mib() -> float:
    """Memory that can be taken without swapping, MiB."""
    try:
        return _proc_mib("/proc/meminfo", "MemAvailable")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def _context():
    """Children are forked from a server that has imported torch and never used it, and so start in milliseconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    return context


def _child(sender: Connection, peer: str, problem: Problem, mode: str, expected: Truth, threads: int) -> None:
    _die_first()
    _return_freed_blocks()
    torch.set_num_threads(threads)
    try:
        sender.send(_measure(peer, problem, mode, expected))
    except (RuntimeError, MemoryError) as error:
        sender.send(ChildResult(failure=f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def _measure(name: str, problem: Problem, mode: str, expected: Truth) -> ChildResult:
    peer = PEERS[name]
    small = Problem(min(WARM_UP_ROWS, problem.n), problem.d, problem.dtype)
    make_call(peer.build(), small.batch(), mode)()
    call = make_call(peer.build(), problem.batch(), mode)
    if peer.compiles:
        call()
    before, peak, method = _watch()
    took, found = seconds(call)
    peak_mib = peak() - before - (problem.gradient_mib() if mode == TRAINING else 0.0)
    return ChildResult(max(0.0, peak_mib), method, took, errors(found, expected))


def _watch():
    """Resident MiB now, a function that gives the highest since, and the method's name."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _proc_mib("/proc/self/status", "VmRSS")
        return before, lambda: _proc_mib("/proc/self/status", "VmHWM"), "VmHWM"
    except OSError:
        return _maxrss_mib(), _maxrss_mib, "ru_maxrss"


def _proc_mib(file: str, field: str) -> float:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def _maxrss_mib() -> float:
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _die_first() -> None:
    """If memory runs out, the kernel ends this process and not its parent."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return


def _return_freed_blocks() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
