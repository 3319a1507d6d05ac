"""The largest batch whose CLIP loss fits into a given memory, computed from measured peaks.

Memory at N = features and their gradients, 4 N D float32 numbers, + the measured peak of a training step extended to N.
A peer whose peak grew faster than N^1.5 over its last two sizes holds matrices: its peak at the largest N is extended
as N^2. Any other's goes along the straight line through its measured sizes. Nothing is counted for a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastclip.benchmarks.case import TRAINING
from fastclip.benchmarks.results import Results, Row
from fastclip.benchmarks.tables import Table

GIGABYTES = (1, 8, 16, 24, 80, 141)  # 141: an H200
SIDES = 4  # two of features, two of gradients
GROWS_AS_MATRIX = 1.5


@dataclass(frozen=True)
class Capacity:
    """bytes(N) = fixed + linear N + quadratic N^2, and the row whose label and style it has."""

    row: Row
    fixed: float
    linear: float
    quadratic: float

    def largest(self, gigabytes: float) -> int:
        """The largest N that fits into this many times 10^9 bytes; 0 where none does."""
        room = gigabytes * 1e9 - self.fixed
        if room <= 0:
            return 0
        if not self.quadratic:
            return int(room / self.linear)
        a, b = self.quadratic, self.linear
        return int((-b + (b * b + 4 * a * room) ** 0.5) / (2 * a))


def capacities(results: Results) -> list[Capacity]:
    """Of every peer whose memory was measured at two sizes or more: fp32 (bf16 on a GPU), main width, training."""
    found = []
    d = results.width("clip")
    dtype = "fp32" if results.suite == "cpu" else "bf16"
    for peer in results.names("peer", case="clip"):
        rows = results.measured(case="clip", peer=peer, d=d, dtype=dtype, mode=TRAINING)
        points = sorted((row.n, row.peak_mib * 2**20) for row in rows if row.peak_mib is not None)
        if len(points) > 1:
            found.append(_extended(rows[0], points, SIDES * d * (4 if dtype == "fp32" else 2)))
    return found


def capacity_table(results: Results) -> Table:
    """Peers by gigabytes."""
    lines = [[c.row.label, *(f"{c.largest(size):,}" for size in GIGABYTES)] for c in capacities(results)]
    return [["", *(f"{size} GB" for size in GIGABYTES)], *lines]


def _extended(row: Row, points: list[tuple[int, float]], bytes_per_pair: int) -> Capacity:
    (n1, y1), (n2, y2) = points[-2:]
    if y1 > 0 and y2 / y1 > (n2 / n1) ** GROWS_AS_MATRIX:
        return Capacity(row, 0.0, bytes_per_pair, y2 / n2**2)
    n_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((n - n_mean) * (y - y_mean) for n, y in points) / sum((n - n_mean) ** 2 for n, _ in points)
    slope = max(0.0, slope)
    return Capacity(row, max(0.0, y_mean - slope * n_mean), bytes_per_pair + slope, 0.0)
