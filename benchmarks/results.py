"""What is kept of one or several runs on one machine: a JSON file, read again by report, plots, page and guard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

SCHEMA = 2
FIT_FROM, FIT_TO = 4096, 16384  # N over which the exponent of time is fitted
PROBLEMS = (
    "only",
    "sizes",
    "dtypes",
    "modes",
    "peers",
    "d",
    "widths",
    "largest_16_bit",
)  # settings that say what was run
SAME = ("cpu", "isa", "threads", "torch", "fastclip")  # what runs kept in one file have in common


@dataclass
class Row:
    """One peer on one problem. Seconds, MiB, GFLOP/s; see `note` where status is not "measured".

    status: measured; not run; out of memory (expected to be, so not run); wrong (timed only on request); failed.
    seconds, ratio, share: measure.Spread as a dict. ratio: this peer's time over the first peer's in the same round.
    child_s: the one call in the process that measured memory; counted among the runs where all calls are slow.
    floor_s: what no way of computing this can avoid: the longer of FLOP / the fastest matrix products of the same dtype
    that torch reached in the same rounds (gemm_gflops, by gemm_library), and bytes / the rate of a copy (byte_floor_s).
    share: floor / seconds, round by round. fp32_share: the same with fp32's products, for 16-bit features on a machine
    whose 16-bit products are slow.
    """

    case: str
    peer: str
    label: str
    n: int
    d: int
    dtype: str
    mode: str
    status: str = "not run"
    note: str = ""
    seconds: dict | None = None
    ratio: dict | None = None
    peak_mib: float | None = None
    peak_method: str = ""
    child_s: float | None = None
    error: dict = field(default_factory=dict)
    floor_s: float | None = None
    byte_floor_s: float | None = None
    gemm_gflops: float | None = None
    gemm_library: str = ""
    share: dict | None = None
    fp32_share: dict | None = None

    @property
    def key(self) -> tuple:
        return self.case, self.peer, self.n, self.d, self.dtype, self.mode

    @property
    def ours(self) -> bool:
        return self.label.startswith("fastclip")


@dataclass
class Results:
    """suite: cpu or gpu; machine: machine.describe; rows in the order they were made.

    extra: tables of other benchmarks, by name, each a list of flat dictionaries. parts: one entry for each run in the
    file: its settings, date, commit, load_at_start and took_s.
    """

    suite: str
    machine: dict
    rows: list[Row] = field(default_factory=list)
    extra: dict[str, list[dict]] = field(default_factory=dict)
    parts: list[dict] = field(default_factory=list)

    def find(self, **wanted: object) -> list[Row]:
        """Rows whose fields have these values."""
        return [row for row in self.rows if all(getattr(row, key) == value for key, value in wanted.items())]

    def measured(self, **wanted: object) -> list[Row]:
        return self.find(status="measured", **wanted)

    def names(self, field_name: str, **wanted: object) -> list:
        """Distinct values of one field, in order of appearance."""
        return list(dict.fromkeys(getattr(row, field_name) for row in self.find(**wanted)))

    def groups(self, case: str) -> Iterator[tuple[str, str]]:
        """(dtype, mode) pairs of a case, in order of appearance."""
        yield from dict.fromkeys((row.dtype, row.mode) for row in self.find(case=case))

    def width(self, case: str) -> int:
        """The width D that most rows of a case have: that of its tables over N."""
        widths = [row.d for row in self.find(case=case)]
        return max(set(widths), key=widths.count)

    def exponent(self, **wanted: object) -> float | None:
        """p of time ~ N^p, by least squares on the logarithms from FIT_FROM to FIT_TO; None with fewer than 3 sizes."""
        rows = [row for row in self.measured(**wanted) if FIT_FROM <= row.n <= FIT_TO]
        if len({row.n for row in rows}) < 3:
            return None
        points = [(math.log(row.n), math.log(row.seconds["median"])) for row in rows]
        x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
        covariance = sum((x - x_mean) * (y - y_mean) for x, y in points)
        return covariance / sum((x - x_mean) ** 2 for x, _ in points)

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows, each in place of an earlier one of the same key."""
        fresh = {row.key: row for row in rows}
        self.rows = [row for row in self.rows if row.key not in fresh] + list(fresh.values())

    def add_part(self, part: dict) -> None:
        """Adds what a run tells of itself, in place of an earlier run of the same problems: its rows are gone."""
        problems = _problems(part)
        self.parts = [known for known in self.parts if problems is None or _problems(known) != problems] + [part]

    def merge(self, other: Results) -> None:
        """Adds what another run on the same machine measured. Raises ValueError where it was another machine."""
        differing = [key for key in ("suite", *SAME) if self._shared(key) != other._shared(key)]
        if differing:
            told = ", ".join(f"{key} {self._shared(key)} and {other._shared(key)}" for key in differing)
            raise ValueError(f"one results file holds runs of one machine and version, got {told}")
        self.add(other.rows)
        self.extra |= other.extra
        for part in other.parts:
            self.add_part(part)

    def _shared(self, key: str) -> object:
        return self.suite if key == "suite" else self.machine.get(key)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all: a run interrupted here leaves the last complete one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")
        partial.replace(path)


def _problems(part: dict) -> str | None:
    """What a run measured, whatever time it took over it; None where it does not say."""
    return json.dumps([part["settings"].get(key) for key in PROBLEMS]) if "settings" in part else None


def load(path: Path) -> Results:
    """Reads what `save` or the GPU suite wrote. Raises ValueError for anything else."""
    content = json.loads(Path(path).read_text())
    if content.get("schema") == SCHEMA:
        rows = [Row(**row) for row in content["rows"]]
        return Results(content["suite"], content["machine"], rows, content["extra"], content["parts"])
    if "gpu" in content.get("machine", {}):
        from fastclip.benchmarks.gpu_rows import from_gpu

        return from_gpu(content)
    raise ValueError(f"{path} has schema {content.get('schema')}, expected {SCHEMA}")


def new_path(folder: Path, stem: str) -> Path:
    """folder/stem.json, or stem-2.json and so on: never a file that exists."""
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path
