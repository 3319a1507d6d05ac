"""Peak memory of one call, in a process of its own.

The child gives every freed block of a MiB or more back at once. It runs a small problem (libraries, threads, their
buffers) and, where the peer compiles, the problem itself once; it then resets the kernel's high-water mark of resident
memory (VmHWM, by /proc/self/clear_refs), makes one call and reads the mark again. Peak = mark - resident memory before
the call - the results' own size, so: what the call needs above its inputs and its results. Without /proc (or where the
mark cannot be reset) the difference of ru_maxrss is used, which cannot see a peak below that of start-up: `method` says
which it was. The call's result is checked in the child, before anything is timed.
"""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from fastclip.benchmarks.case import Problem, Truth, errors
from fastclip.benchmarks.children import return_freed_blocks
from fastclip.benchmarks.measure import seconds

WARM_UP_ROWS = 256


@dataclass(frozen=True)
class Peak:
    """peak_mib above inputs and results; method as above; seconds of the one call; error as case.errors."""

    peak_mib: float
    method: str
    seconds: float
    error: dict[str, float]


def measure_peak(peer_name: str, problem: Problem, truth: Truth) -> Peak:
    """To be run in a child."""
    from fastclip.benchmarks.cases import CASES

    return_freed_blocks()
    case = CASES[problem.case]
    peer = case.peers[peer_name]
    peer.prepare(problem.of_size(WARM_UP_ROWS))()
    call = peer.prepare(problem)
    if peer.compiles:
        call()
    before, peak, method = watch()
    took, found = seconds(call)
    peak_mib = peak() - before - case.results_mib(problem)
    return Peak(max(0.0, peak_mib), method, took, errors(case.observe(found, problem), truth))


def available_mib() -> float:
    """Memory that can be taken without swapping, MiB."""
    try:
        return _proc_mib("/proc/meminfo", "MemAvailable")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def watch():
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
