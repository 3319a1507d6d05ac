"""What a case of the suite is: problems, the peers that compute them, and the float64 result they are checked against.

A case is one kind of work (a loss, ranks, a training step). Its peers compute the same thing in different ways; each
result is a dictionary of named tensors, compared name by name with the truth before anything is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastclip.benchmarks.config import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, TRAINING = "forward", "forward+backward"

Found = dict[str, Tensor]
Call = Callable[[], Found]

# A relative error up to this is rounding, whatever the yardstick's own: float32 sums of many terms that cancel (a
# product rounded to TF32 or bf16 would leave 1e-3), or a few units in the last place of a 16-bit loss or gradient.
ROUNDING = {"fp32": 5e-5, "bf16": 2e-2, "fp16": 3e-3}
ALLOWED_RATIO = 4.0  # otherwise an error may be this many times the yardstick's in the same dtype
NEVER_ABOVE = {"fp32": 1e-2, "bf16": 0.2, "fp16": 5e-2}  # whatever the yardstick does


@dataclass(frozen=True)
class Problem:
    """One thing to compute, reproducible from these values in any process.

    case: a key of CASES. n: batch size, or rows of each side. d: width of the embeddings. dtype: a key of DTYPES, that
    of the features. mode: what is asked of the case, such as forward or forward+backward.
    """

    case: str
    n: int
    d: int
    dtype: str
    mode: str
    seed: int = 0

    def of_size(self, n: int) -> Problem:
        """The same with at most n rows."""
        return replace(self, n=min(n, self.n))

    def __str__(self) -> str:
        return f"{self.case} N={self.n} D={self.d} {self.dtype} {self.mode}"


@dataclass(frozen=True)
class Truth:
    """values: the right results in float64, by name. rows: for those compared on a sample of rows, their indices."""

    values: Found
    rows: Found = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One way of computing a case. name: in files and on the command line. label: in tables.

    prepare: makes the inputs and the function, and returns a call without arguments.
    matrices: how many float32 N x N matrices it holds at its peak in training, 0 for none.
    dtypes, modes: what it can do; empty for all of the case's.
    why_not: None where it can run here, else the reason, with the line that installs what is missing.
    compiles: the first call of a shape takes seconds and is no measurement.
    """

    name: str
    label: str
    prepare: Callable[[Problem], Call]
    matrices: float = 0.0
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    why_not: Callable[[], str | None] = lambda: None
    compiles: bool = False

    def can(self, problem: Problem) -> bool:
        return problem.dtype in (self.dtypes or DTYPES) and problem.mode in (self.modes or (problem.mode,))

    def predicted_mib(self, problem: Problem) -> float:
        """Its matrices' part of the peak memory."""
        return self.matrices * 4 * problem.n**2 / 2**20


def by_name(*peers: Peer) -> dict[str, Peer]:
    """What a case's `peers` are made with; the first one is what the others' times are divided by."""
    return {peer.name: peer for peer in peers}


class Case(ABC):
    """One kind of work. `reference` names the peer whose rounding error is the yardstick for everybody's."""

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    rounding: ClassVar[dict[str, float]] = ROUNDING
    patience: ClassVar[float] = 1.0  # how many times --call-limit-s a call may take

    peers: ClassVar[dict[str, Peer]]

    @abstractmethod
    def problems(self, config: Config) -> list[Problem]:
        """What is measured, smallest first: what is expected of a size is known from the one before."""

    @abstractmethod
    def truth(self, problem: Problem) -> Truth:
        """The results in float64, plainly written, nothing shared with fastclip."""

    @abstractmethod
    def floor(self, problem: Problem) -> tuple[float, float]:
        """(FLOP, bytes) that no way of computing this can avoid; 0 where no floor is known."""

    def observe(self, found: Found, problem: Problem) -> Found:
        """What is compared of a result; computed after the call, outside all timing."""
        return found

    def results_mib(self, problem: Problem) -> float:
        """Size of the results, which is not counted as memory that a peer needs."""
        return 0.0

    def wants(self, peer: Peer, problem: Problem, config: Config) -> bool:
        """Whether this run has a row for the peer."""
        return peer.can(problem) and (not config.peers or peer.name in config.peers)

    def complaint(self, error: dict[str, float], yardstick: dict[str, float], dtype: str) -> str | None:
        """Why a result is wrong, in a sentence, or None: an error above rounding and ALLOWED_RATIO x the yardstick."""
        for name, value in error.items():
            allowed = max(self.rounding[dtype], ALLOWED_RATIO * yardstick.get(name, 0.0))
            limit = min(NEVER_ABOVE[dtype], allowed)
            if not value <= limit:
                return f"wrong {name}: relative error {value:.1e} against float64, at most {limit:.1e} allowed"
        return None


def errors(found: Found, truth: Truth) -> dict[str, float]:
    """Relative errors by name, |found - expected| / |expected| in the 2-norm, of what was found and is known."""
    result = {}
    for name, expected in truth.values.items():
        if name in found:
            got = found[name].detach()
            if name in truth.rows:
                got = got[truth.rows[name]]
            difference = got.to(expected.device, torch.float64) - expected
            result[name] = float(difference.norm() / expected.norm().clamp_min(1e-300))
    if not result:
        raise ValueError(f"nothing to compare: found {sorted(found)}, expected {sorted(truth.values)}")
    return result
