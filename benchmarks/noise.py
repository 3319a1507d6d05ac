"""How much of the processor other programs, or other machines on the same host, had during a run (Linux)."""

from __future__ import annotations

import os
import time
from pathlib import Path

QUIET_CORES = 0.15  # less than this of other work does not move a median
SHORTEST_S = 2.0  # a run shorter than this, with its own start, tells nothing: the system counts in hundredths


class Noise:
    """Counts from its making to `measured`."""

    def __init__(self) -> None:
        self.start = _counters()
        self.start_s = time.perf_counter()

    def measured(self) -> dict[str, float]:
        """others_cores: cores that other programs kept busy, stolen_cores: cores that the host gave elsewhere, both on
        average; cpu_s: processor time of this run. Empty where the system does not tell or the run was too short."""
        end, took = _counters(), time.perf_counter() - self.start_s
        if self.start is None or end is None or took < SHORTEST_S:
            return {}
        busy, stolen, own = (b - a for a, b in zip(self.start, end, strict=True))
        return {
            "others_cores": round(max(0.0, busy - own) / took, 2),
            "stolen_cores": round(stolen / took, 2),
            "cpu_s": round(own, 1),
        }


def warning(parts: list[dict], cores: int) -> str | None:
    """A sentence where a run was disturbed."""
    others, stolen = (_worst(parts, key) for key in ("others_cores", "stolen_cores"))
    told = [f"other programs used {others:g}"] if others > QUIET_CORES else []
    told += [f"the host took {stolen:g}"] if stolen > QUIET_CORES else []
    if not told:
        return None
    what = " and ".join(told)
    return f"{what[0].upper()}{what[1:]} of the {cores} cores meanwhile: absolute times are too high, ratios less so."


def _worst(parts: list[dict], key: str) -> float:
    return max((part.get(key, 0.0) for part in parts), default=0.0)


def _counters() -> tuple[float, float, float] | None:
    """Seconds of processor time since boot: of all programs, stolen by the host, of this run's process group."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, fields)
        own = sum(_group_ticks(folder / "stat") for folder in Path("/proc").iterdir() if folder.name.isdigit())
    except (OSError, ValueError):
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks, own / ticks


def _group_ticks(stat: Path) -> int:
    """Of one process and its children that have ended, where it belongs to this process group (proc(5))."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:  # it ended meanwhile; its parent has its time
        return 0
    return sum(map(int, fields[11:15])) if int(fields[2]) == os.getpgrp() else 0
