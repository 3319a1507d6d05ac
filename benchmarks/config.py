"""What `python -m benchmarks` takes on its command line."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.peers import PEERS
from benchmarks.problems import DTYPES, MODES, Problem


@dataclass(frozen=True)
class Config:
    """Time, memory and error of the CLIP loss on this machine's processor, beside its alternatives.

    Flags left out take the values of the full run, or with --quick those of one under three minutes on two cores.
    """

    quick: bool = False
    """The short run: N = 1024 and 4096, torch.compile in fp32 alone."""
    sizes: tuple[int, ...] = ()
    """Batch sizes N."""
    largest_16_bit: int = 16384
    """Largest of those N for bf16 and fp16."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """Dtypes of the features: fp32, bf16, fp16."""
    modes: tuple[str, ...] = MODES
    """forward (no graph), forward+backward, or both."""
    peers: tuple[str, ...] = tuple(PEERS)
    """What to measure; the first one is what the others are compared with."""
    d: Annotated[int, tyro.conf.arg(name="dim")] = 512
    """Width D of the embeddings."""
    threads: int = 2
    """Threads of torch and of the kernels."""
    call_limit_s: float | None = None
    """A call expected to take longer (from the size before, as N^2) is not made."""
    group_s: float | None = None
    """Time for the paired runs of one N, dtype and mode; at least two rounds are made."""
    memory_limit_gib: float | None = None
    """A peer expected to need more is not run; 0.8 of what is available if not given."""
    memory: bool = True
    """Measure the peak memory of every case in a process of its own."""
    out: Path | None = None
    """Results file; benchmarks/results/CPU-DATE.json if not given, never one that exists."""
    plots: bool = True
    """Write PNG files beside the results file (needs matplotlib)."""

    def __post_init__(self) -> None:
        for field, given, known in (
            ("dtypes", self.dtypes, DTYPES),
            ("modes", self.modes, MODES),
            ("peers", self.peers, PEERS),
        ):
            if not given or set(given) - set(known):
                raise ValueError(f"--{field} takes one or more of {', '.join(known)}; got {' '.join(given) or 'none'}")
        if self.threads < 1 or self.d < 1 or any(n < 2 for n in self.sizes):
            raise ValueError("--threads and --dim must be at least 1, and every one of --sizes at least 2")

    def resolved(self) -> "Config":
        """The same with every value filled in."""
        sizes, call_limit_s, group_s = QUICK if self.quick else FULL
        return replace(
            self,
            sizes=tuple(sorted(self.sizes or sizes)),
            call_limit_s=call_limit_s if self.call_limit_s is None else self.call_limit_s,
            group_s=group_s if self.group_s is None else self.group_s,
        )

    def rounds(self) -> range:
        """At least start, at most stop rounds of paired runs."""
        return range(2, 7) if self.quick else range(2, 15)

    def problems(self) -> list[Problem]:
        """Every N and dtype, smallest first: what is expected of a size is known from the one before."""
        return [
            Problem(n, self.d, dtype)
            for n in self.sizes
            for dtype in self.dtypes
            if dtype == "fp32" or n <= self.largest_16_bit
        ]

    def wants(self, peer: str, dtype: str) -> bool:
        """Whether this run has a row for the peer in this dtype."""
        slow = self.quick and PEERS[peer].compiles and dtype != "fp32"
        return dtype in PEERS[peer].dtypes and not slow


# sizes, call_limit_s, group_s
QUICK = ((1024, 4096), 4.0, 2.0)
FULL = ((1024, 2048, 4096, 8192, 16384, 32768), 40.0, 8.0)
