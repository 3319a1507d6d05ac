"""What was wrong with the data, by kind: how often, and where first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastclip.errors import UserError

# The kinds. A sample with one of these cannot be used; another takes its place.
SKIPPED = (
    "bad image",
    "missing image",
    "missing caption",
    "empty caption",
    "unreadable file",
)
# A shard, a member of one or a line of a table that is left alone: how many samples are lost with it is not known.
REFUSED = (
    "bad row",
    "unreadable shard",
    "damaged shard",
    "empty shard",
    "changed shard",
    "unsafe name",
    "not a regular file",
    "oversized member",
    "duplicate member",
    "member not read",
)
# The sample is used.
MENDED = ("bad UTF-8", "long caption")
KINDS = (*SKIPPED, *REFUSED, *MENDED)
NAMES_KEPT = 5
NAME_LENGTH = 200
# No share is judged on fewer samples than this.
JUDGED_FROM = 100


@dataclass
class DataReport:
    """Counts over the samples handed out so far, and the first names of each kind (see KINDS).

    `samples`: good ones. `duplicates`: captions that had already occurred in their batch.
    """

    samples: int = 0
    duplicates: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        assert kind in KINDS, kind
        self.counts[kind] = self.counts.get(kind, 0) + 1
        names = self.names.setdefault(kind, [])
        if len(names) < NAMES_KEPT:
            # Names come from strangers: no line breaks, no terminal codes, no novels.
            names.append("".join(c if c.isprintable() else "?" for c in name[:NAME_LENGTH]))

    def merge(self, other: DataReport) -> None:
        """Add another part's counts: of a batch, a worker or a process."""
        self.samples += other.samples
        self.duplicates += other.duplicates
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            names = self.names.setdefault(kind, [])
            names += other.names[kind][: NAMES_KEPT - len(names)]

    @property
    def skipped(self) -> int:
        return sum(self.counts.get(kind, 0) for kind in SKIPPED)

    def check(self, highest_share: float, *, final: bool = False) -> None:
        """UserError where more than this share of the samples had to be skipped; `final` judges however few."""
        seen = self.samples + self.skipped
        if (seen >= JUDGED_FROM or final) and self.skipped > highest_share * seen:
            raise UserError(
                f"{self.skipped:,} of {seen:,} samples cannot be used, more than the {highest_share:.0%} that "
                f"--data.max-skipped allows: {self.summary(SKIPPED)}"
            )

    def summary(self, kinds: Iterable[str] = KINDS) -> str:
        """One line: counts and first names, such as "missing caption 2 (a.png, b.png)"."""
        found = [
            f"{kind} {self.counts[kind]:,} ({', '.join(self.names[kind])}"
            f"{', ...' if self.counts[kind] > len(self.names[kind]) else ''})"
            for kind in kinds
            if kind in self.counts
        ]
        return "; ".join(found) or "nothing wrong"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        names = {kind: list(names) for kind, names in self.names.items()}
        return {"samples": self.samples, "duplicates": self.duplicates, "counts": dict(self.counts), "names": names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        report = cls()
        report.merge(cls(**values))
        return report


def merged_over_ranks(report: DataReport, group=None) -> DataReport:
    """The sum over the processes of a torch.distributed group, on each of them; `report` itself without one."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return report
    parts: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(parts, report.to_dict(), group=group)
    total = DataReport()
    for part in parts:
        total.merge(DataReport.from_dict(part))
    return total
