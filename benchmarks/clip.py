"""The case "clip": CLIP's softmax loss, forward and forward + backward, over N, D and dtype."""

import functools

from fastclip.benchmarks.case import DTYPES, TRAINING, Case, Peer, Problem, Truth
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.peers import PEERS
from fastclip.benchmarks.problems import batch, feature_mib
from fastclip.benchmarks.truth import truth

QUICK, FULL = (1024, 4096), (1024, 2048, 4096, 8192, 16384, 65536)
WIDTHS_AT = 4096  # N at which other widths are measured


class ClipCase(Case):
    """The first of the cases: its tables and pictures are the README's."""

    name = "clip"
    title = "CLIP loss"
    reference = "dense"
    peers = PEERS

    def problems(self, config: Config) -> list[Problem]:
        wanted = [
            Problem(self.name, n, config.d, dtype, mode)
            for n in sorted(config.sizes or (QUICK if config.quick else FULL))
            for dtype in config.dtypes
            for mode in config.modes
            if dtype == "fp32" or n <= config.largest_16_bit
        ]
        widths = set(config.widths) - {config.d} if TRAINING in config.modes and "fp32" in config.dtypes else ()
        return wanted + [Problem(self.name, WIDTHS_AT, d, "fp32", TRAINING) for d in sorted(widths)]

    def wants(self, peer: Peer, problem: Problem, config: Config) -> bool:
        """In a quick run what compiles is only measured once: compiling takes longer than all else."""
        if config.quick and peer.compiles and not config.peers:
            largest = problem.n == max(config.sizes or QUICK)
            return largest and problem.mode == TRAINING and problem.dtype == "fp32"
        return super().wants(peer, problem, config)

    def truth(self, problem: Problem) -> Truth:
        return _truth(problem.n, problem.d, problem.dtype, problem.seed)

    def floor(self, problem: Problem) -> tuple[float, float]:
        """FLOP: S once forward; S again and two products backward. Bytes: features read, their gradients written."""
        n, d, training = problem.n, problem.d, problem.mode == TRAINING
        features = 2 * n * d * DTYPES[problem.dtype].itemsize
        return (8 if training else 2) * n**2 * d, features * (3 if training else 1)

    def results_mib(self, problem: Problem) -> float:
        return 2 * feature_mib(problem) if problem.mode == TRAINING else 0.0


@functools.lru_cache(maxsize=1)
def _truth(n: int, d: int, dtype: str, seed: int) -> Truth:
    """One for all modes."""
    return truth(batch(Problem("clip", n, d, dtype, TRAINING, seed)))
