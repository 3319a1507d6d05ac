"""Memory: what this process took, and what N x N matrices would take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastclip.errors import UserError
from fastclip.train.config import TrainConfig

# What cross_entropy(S) + cross_entropy(S.T) holds at its peak.
DENSE_MATRICES = 4
DENSE_COUNTS = "4 float32 N x N matrices: logits, two log-softmaxes, one gradient"


def peak_mib(device: torch.device | None = None) -> float:
    """Highest memory of this process so far, MiB: torch's on a GPU, else what is resident.

    0.0 where the system does not tell (Windows).
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def dense_mib(n: int) -> float:
    """MiB that the dense loss would hold for a batch of n."""
    return DENSE_MATRICES * 4 * n * n / 2**20


def memory(batch: int) -> dict[str, float | str]:
    """This process's peak beside the dense loss's matrices, at `batch` and at 32,768."""
    return {
        "peak_mib": peak_mib(),
        "dense_mib": dense_mib(batch),
        "dense_mib_at_32768": dense_mib(32768),
        "dense_counts": DENSE_COUNTS,
    }


@contextmanager
def out_of_memory_explained(config: TrainConfig, pairs: int) -> Iterator[None]:
    """Running out of memory inside becomes a UserError that names the setting to lower; `pairs` of each process."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not is_memory:
            raise
        if config.micro_batch is None:
            advice = f"set --micro-batch, such as {max(1, pairs // 8)}: the result is that of the whole batch"
        else:
            advice = "lower --micro-batch"
        raise UserError(
            f"out of memory with --batch {config.batch} and --micro-batch {config.micro_batch}; {advice}"
        ) from error
