"""Whether two runs on one machine say the same, within the spreads that they print.

    python -m benchmarks.agree A.json B.json

Compared are the paired ratios and the shares of the floor of everything that both measured: two values agree where
their printed spreads (measure.Spread) overlap. Seconds are counted apart, as a clock that slows down between two runs
moves them and not the others. Exit code 1 where a ratio or a share disagrees.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastclip.benchmarks.guard import overlap
from fastclip.benchmarks.measure import Spread
from fastclip.benchmarks.results import Results, load

KINDS = ("ratio", "share", "seconds")


@dataclass(frozen=True)
class Verdict:
    """compared, agreeing: how many of each kind. differences: one line for each value that does not agree."""

    compared: dict[str, int]
    agreeing: dict[str, int]
    differences: list[str]

    @property
    def good(self) -> bool:
        kinds = ("ratio", "share")
        return sum(self.compared[kind] for kind in kinds) > 0 and all(
            self.agreeing[kind] == self.compared[kind] for kind in kinds
        )


def agree(a: Results, b: Results) -> Verdict:
    """Compares everything that both measured."""
    others = {row.key: row for row in b.measured()}
    compared, agreeing, differences = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), []
    for row in a.measured():
        other = others.get(row.key)
        for kind in KINDS:
            values = getattr(row, kind), getattr(other, kind, None)
            if not all(values) or (kind == "ratio" and values[0]["runs"] == [1.0] * len(values[0]["runs"])):
                continue  # the first peer's ratio to itself says nothing
            first, second = (Spread(**value) for value in values)
            compared[kind] += 1
            if overlap(first, second):
                agreeing[kind] += 1
            else:
                told = " and ".join(f"{s.median:.3g} ({s.low:.3g}-{s.high:.3g})" for s in (first, second))
                problem = f"{row.case} N={row.n} D={row.d} {row.dtype} {row.mode}, {row.label}"
                differences.append(f"{kind} of {problem}: {told}")
    return Verdict(compared, agreeing, differences)


@dataclass(frozen=True)
class AgreeConfig:
    """Say whether two runs agree within the spreads that they print."""

    a: tyro.conf.Positional[Path]
    b: tyro.conf.Positional[Path]


def main(config: AgreeConfig) -> int:
    verdict = agree(load(config.a), load(config.b))
    for kind in KINDS:
        print(f"{kind}: {verdict.agreeing[kind]} of {verdict.compared[kind]} agree within their spreads")
    print("\n".join(verdict.differences) or "no difference")
    return int(not verdict.good)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(AgreeConfig)))
