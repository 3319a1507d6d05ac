"""Whether fastclip became slower from one results file to another, by measures that do not depend on the day.

    fastclip bench --quick --against benchmarks/results/X.json        measures now, and compares
    python -m benchmarks.guard OLD.json NEW.json                      compares two files

What is compared, for every problem that both files have: fastclip's share of the floor, whose matrix products ran in
the same rounds; where a case has no floor, its time over that of the case's plain form in the same rounds. Never
seconds with seconds. Slower is what is above the threshold and whose spreads, then and now, do not overlap; where they
do the machine was too busy to tell, and that is said.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastclip.benchmarks.measure import Spread, paired
from fastclip.benchmarks.results import SAME, Results, Row, load

THRESHOLD = 1.15
SLOWER, UNCLEAR = "SLOWER", "UNCLEAR: the spreads overlap"


@dataclass(frozen=True)
class Change:
    """One peer on one problem, then and now. by: what was compared; slowdown: 2.0 is twice as slow.

    now: None where it was tried and has no figure.
    """

    row: Row
    by: str
    then: Spread
    now: Spread | None
    slowdown: float

    def verdict(self, threshold: float) -> str:
        """ "" below the threshold, else SLOWER, UNCLEAR, or the status of a row that has no figure any more."""
        if self.now is None:
            return self.row.status.upper()
        if self.slowdown <= threshold:
            return ""
        return UNCLEAR if overlap(self.then, self.now) else SLOWER

    def failed(self, threshold: float) -> bool:
        return self.verdict(threshold) not in ("", UNCLEAR)


def compare(old: Results, new: Results) -> list[Change]:
    """Every measurement of fastclip in `old` for whose problem `new` has a row, in the order of `new`.

    One that `new` tried and did not get right, or not to an end, counts as infinitely slow.
    """
    before = {row.key: row for row in old.measured() if row.ours}
    changes = []
    for row in new.rows:
        if row.key not in before or (row.status == "not run" and not row.seconds):
            continue
        then = relative(old, before[row.key])
        now = relative(new, row) if row.status == "measured" else None
        if row.status != "measured" and then is not None:
            changes.append(Change(row, then[0], then[1], None, float("inf")))
        elif then is not None and now is not None and then[0] == now[0]:
            higher_is_better = then[0] == "share of the floor"
            slowdown = then[1].median / now[1].median if higher_is_better else now[1].median / then[1].median
            changes.append(Change(row, then[0], then[1], now[1], slowdown))
    return changes


def relative(results: Results, row: Row) -> tuple[str, Spread] | None:
    """(what, value) of a measured row: its share of the floor, or its time over the plain form's in the same rounds."""
    if row.share:
        return "share of the floor", Spread(**row.share)
    others = results.measured(case=row.case, n=row.n, d=row.d, dtype=row.dtype, mode=row.mode)
    plain = next((other for other in others if not other.ours), None)
    if plain is None or len(plain.seconds["runs"]) != len(row.seconds["runs"]):
        return None
    times = (row.seconds["runs"], plain.seconds["runs"], row.seconds.get("processes", ()))
    return f"time over that of {plain.label}", paired(*times)


def overlap(a: Spread, b: Spread) -> bool:
    return a.low <= b.high and b.low <= a.high


def told(changes: list[Change], threshold: float, old: Results, new: Results) -> str:
    """What was compared and what came of it, the worst first, for a terminal."""
    lines = [f"Compared with {old.machine.get('date', '')[:10]}, commit {old.machine.get('commit')}:"]
    differing = [key for key in SAME if old.machine.get(key) != new.machine.get(key)]
    if differing:
        pairs = ", ".join(f"{key} {old.machine.get(key)} and {new.machine.get(key)}" for key in differing)
        lines.append(f"  the two differ in {pairs}: a change may come from there")
    for change in sorted(changes, key=lambda change: -change.slowdown):
        row = change.row
        now = f"{change.now.median:.3f}" if change.now else "-"
        problem = f"{row.case} N={row.n} D={row.d} {row.dtype} {row.mode}, {row.label}"
        values = f"{change.by} {change.then.median:.3f} -> {now}"
        verdict = change.verdict(threshold) + (f": {row.note}" if change.now is None else "")
        lines.append(f"  {change.slowdown:5.2f}x as slow  {problem}: {values}  {verdict}".rstrip())
    failed = sum(change.failed(threshold) for change in changes)
    unclear = sum(change.verdict(threshold) == UNCLEAR for change in changes)
    lines.append(f"{len(changes)} compared, {failed} more than {threshold:g} times as slow, {unclear} unclear")
    return "\n".join(lines)


@dataclass(frozen=True)
class GuardConfig:
    """Compare two results files; exit code 1 where fastclip became slower than the threshold allows."""

    old: tyro.conf.Positional[Path]
    new: tyro.conf.Positional[Path]
    threshold: float = THRESHOLD
    """How many times as slow is too slow."""


def main(config: GuardConfig) -> int:
    old, new = load(config.old), load(config.new)
    changes = compare(old, new)
    print(told(changes, config.threshold, old, new))
    return int(not changes or any(change.failed(config.threshold) for change in changes))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(GuardConfig)))
