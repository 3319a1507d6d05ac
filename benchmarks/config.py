"""What `fastclip bench` and `python -m benchmarks` take on their command lines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

USUAL = ("clip", "siglip", "ranks", "topk", "step", "loading", "sharded")
ON_REQUEST = ("grad_caching", "large_batch", "models", "scaling")  # minutes each: only where --only names them
CASES = USUAL + ON_REQUEST
DTYPES = ("fp32", "bf16", "fp16")
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Config:
    """Time, memory and error of fastclip beside its alternatives, on this machine.

    Flags left out take the values of the full run, or with --quick those of one under three minutes on two cores.
    """

    quick: bool = False
    """The short run: few sizes, fp32."""
    only: tuple[str, ...] = ()
    """Cases to run, of clip siglip ranks topk step loading sharded, which are run if this is not given, and
    grad_caching large_batch models scaling, which take minutes each."""
    sizes: tuple[int, ...] = ()
    """Batch sizes N (rows of each side for ranks and topk); each case has its own if not given."""
    dtypes: tuple[str, ...] = ()
    """Dtypes of the features: fp32, bf16, fp16."""
    modes: tuple[str, ...] = MODES
    """For the losses: forward (no graph), forward+backward, or both."""
    peers: tuple[str, ...] = ()
    """Names of what to measure, such as cpu dense; all if not given. The case's first one is the others' measure."""
    d: Annotated[int, tyro.conf.arg(name="dim")] = 512
    """Width D of the embeddings of the losses."""
    widths: tuple[int, ...] | None = None
    """Further widths D, for the CLIP loss at N = 4096 in fp32."""
    largest_16_bit: int = 8192
    """Largest N of the CLIP loss for bf16 and fp16; half of it for the sigmoid."""
    threads: int | None = None
    """Threads of torch and of the kernels; torch's own choice if not given."""
    call_limit_s: float | None = None
    """A call expected to take longer (from the size before, as N^2) is not made."""
    group_s: float | None = None
    """Time for the paired runs of one problem; each process makes two rounds all the same, one where they are slow."""
    processes: int | None = None
    """Processes that the paired runs of one problem are spread over, and they over the run; three where it is slow."""
    memory_limit_gib: float | None = None
    """A peer expected to need more is not run; 0.8 of what is available if not given."""
    memory: bool = True
    """Measure the peak memory of every call in a process of its own."""
    time_wrong: bool = False
    """Time also what gave a wrong result; it is marked as wrong."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """gpu is `make gpu`'s benchmark; auto takes it where there is a CUDA device."""
    out: Path | None = None
    """Results file; RESULTS/CPU-DATE.json if not given, never one that exists."""
    add: Path | None = None
    """Results file of this machine to add to; what it has of the same problems and peers is replaced. Its times tell
    which calls would take too long."""
    plots: bool = True
    """Write PNG files and an HTML page beside the results file (needs matplotlib)."""
    against: Path | None = None
    """An earlier results file to compare with: exit code 1 where fastclip became slower than --threshold allows."""
    threshold: float = 1.15
    """How many times as long, relative to the floor or the reference of the same run, is too slow for --against."""

    def check(self) -> None:
        """Raises ValueError, with the flag's name, for settings that cannot be."""
        for flag, given, known in (("only", self.only, CASES), ("dtypes", self.dtypes, DTYPES)):
            _check(flag, given, known)
        _check("modes", self.modes, MODES)
        if not self.modes:
            raise ValueError(f"--modes takes one or more of {', '.join(MODES)}")
        numbers = (self.d, self.threads or 1, self.processes or 1, *(self.widths or ()))
        if min(numbers) < 1 or any(n < 2 for n in self.sizes):
            raise ValueError("--threads, --processes, --dim and --widths must be at least 1, and --sizes at least 2")
        if self.threshold <= 1:
            raise ValueError(f"--threshold must be above 1, got {self.threshold}")
        if self.out and self.add:
            raise ValueError("--out and --add exclude each other")

    def resolved(self) -> Config:
        """The same with every value filled in that does not belong to a case."""
        missing = {name: value for name, value in (QUICK if self.quick else FULL).items() if not getattr(self, name)}
        if self.widths is not None:
            missing.pop("widths", None)
        return replace(self, **missing, threads=self.threads or _threads())

    def wants(self, case: str) -> bool:
        return case in (self.only or USUAL)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _check(flag: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    wrong = set(given) - set(known)
    if wrong:
        raise ValueError(f"--{flag} takes {', '.join(known)}; got {' '.join(sorted(wrong))}")


QUICK = {"dtypes": ("fp32",), "widths": (), "call_limit_s": 4.0, "group_s": 2.0, "processes": 4}
FULL = {"dtypes": ("fp32", "bf16"), "widths": (128, 1024), "call_limit_s": 32.0, "group_s": 12.0, "processes": 4}
