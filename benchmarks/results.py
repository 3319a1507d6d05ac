"""What is kept of a run: one JSON file, read again by report and plots."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

SCHEMA = 1
FIT_FROM, FIT_TO = 4096, 16384  # N over which the exponent of time is fitted


@dataclass
class Row:
    """One peer on one problem. Seconds, MiB, GFLOP/s; see `note` where status is not "measured".

    status: measured; not run; out of memory (expected to be, so not run); failed (wrong or crashed, so not timed).
    seconds: median, low, high and every run. ratio: this peer's time over the first peer's in the same round.
    child_s: the one call in the process that measured memory; counted among the runs where all calls are slow.
    floor_s: FLOP that no loss without the matrix can avoid / the fastest GEMM of the same dtype that torch reached
    between these runs (gemm_gflops, by gemm_library); share = floor_s / seconds. fp32_share: the same with fp32's GEMM
    rate, for 16-bit features on a machine whose 16-bit GEMM is slow.
    """

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
    gemm_gflops: float | None = None
    gemm_library: str = ""
    share: float | None = None
    fp32_share: float | None = None


@dataclass
class Results:
    """suite: cpu or gpu; machine: machine.describe; settings: the command line; rows in the order they were made."""

    suite: str
    machine: dict
    settings: dict
    rows: list[Row] = field(default_factory=list)
    took_s: float = 0.0

    def find(self, **wanted: object) -> list[Row]:
        """Rows whose fields have these values."""
        return [row for row in self.rows if all(getattr(row, key) == value for key, value in wanted.items())]

    def measured(self, **wanted: object) -> list[Row]:
        return self.find(status="measured", **wanted)

    def names(self, field_name: str, **wanted: object) -> list:
        """Distinct values of one field, in order of appearance."""
        return list(dict.fromkeys(getattr(row, field_name) for row in self.find(**wanted)))

    def groups(self) -> Iterator[tuple[str, str]]:
        """(dtype, mode) pairs, in order of appearance."""
        yield from dict.fromkeys((row.dtype, row.mode) for row in self.rows)

    def exponent(self, **wanted: object) -> float | None:
        """p of time ~ N^p, by least squares on the logarithms from FIT_FROM to FIT_TO; None with fewer than 3 sizes."""
        rows = [row for row in self.measured(**wanted) if FIT_FROM <= row.n <= FIT_TO]
        if len(rows) < 3:
            return None
        points = [(math.log(row.n), math.log(row.seconds["median"])) for row in rows]
        x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
        covariance = sum((x - x_mean) * (y - y_mean) for x, y in points)
        return covariance / sum((x - x_mean) ** 2 for x, _ in points)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all: a run interrupted here leaves the last complete one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, **asdict(self)}
        content["exponents"] = [
            {"peer": peer, "dtype": dtype, "mode": mode, "exponent": exponent}
            for dtype, mode in self.groups()
            for peer in self.names("peer", dtype=dtype, mode=mode)
            if (exponent := self.exponent(peer=peer, dtype=dtype, mode=mode)) is not None
        ]
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)


def load(path: Path) -> Results:
    """Raises ValueError for a file of another schema."""
    content = json.loads(Path(path).read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')}, expected {SCHEMA}")
    rows = [Row(**row) for row in content["rows"]]
    return Results(content["suite"], content["machine"], content["settings"], rows, content["took_s"])


def new_path(folder: Path, stem: str) -> Path:
    """folder/stem.json, or stem-2.json and so on: never a file that exists."""
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path
