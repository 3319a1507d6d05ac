"""Tables of a results file: lists of lines of cells, the first line and the first column their names."""

from __future__ import annotations

from collections.abc import Callable

from fastclip.benchmarks.case import TRAINING
from fastclip.benchmarks.results import Results, Row

Table = list[list[str]]


def time_cell(row: Row) -> str:
    """Median."""
    return seconds(row.seconds["median"])


def ratio_cell(row: Row) -> str:
    """Times as long as the case's first peer in the same rounds: median, and the spread of the rounds."""
    if not row.ratio:
        return ""
    itself = set(row.ratio["runs"]) == {1.0}
    return "1x" if itself else spread(row.ratio, "x")


def memory_cell(row: Row) -> str:
    """Peak above inputs and results."""
    return mib(row.peak_mib)


def floor_cell(row: Row) -> str:
    """Floor / time; for 16-bit features the fp32 floor's share in parentheses."""
    if not row.share:
        return ""
    share = f"{row.share['median']:.2f}"
    return share if row.dtype == "fp32" else f"{share} ({row.fp32_share['median']:.2f})"


def error_cell(row: Row) -> str:
    """The worst relative error of anything compared with float64."""
    return f"{max(row.error.values()):.0e}" if row.error else ""


KINDS: dict[str, Callable[[Row], str]] = {
    "time": time_cell,
    "ratio": ratio_cell,
    "memory": memory_cell,
    "floor": floor_cell,
    "error": error_cell,
}


def by_size(results: Results, kind: str, case: str, dtype: str, mode: str) -> Table:
    """Peers by N, at the case's main width."""
    wanted = {"case": case, "dtype": dtype, "mode": mode, "d": results.width(case)}
    return _by(results, kind, "n", "N", wanted)


def by_width(results: Results, kind: str) -> Table:
    """Peers by D: the CLIP loss in training, fp32, at the N for which there are most widths."""
    wanted = {"case": "clip", "dtype": "fp32", "mode": TRAINING}
    sizes = results.names("n", **wanted)
    n = max(sizes, key=lambda n: len(results.names("d", n=n, **wanted)))
    return _by(results, kind, "d", "D", {**wanted, "n": n})


def exponents(results: Results, case: str = "clip") -> Table:
    """p of time ~ N^p, peers by dtype and mode."""
    groups, d = list(results.groups(case)), results.width(case)
    lines = []
    for peer in results.names("peer", case=case):
        found = [results.exponent(case=case, peer=peer, dtype=dtype, mode=mode, d=d) for dtype, mode in groups]
        if any(found):
            label = results.find(case=case, peer=peer)[0].label
            lines.append([label, *("" if p is None else f"{p:.2f}" for p in found)])
    return [["", *(f"{dtype} {mode}" for dtype, mode in groups)], *lines]


def not_run(results: Results) -> Table:
    """What has no figure, and why: the smallest N of each peer, dtype and mode that has none."""
    lines = {}
    for row in sorted(results.rows, key=lambda row: row.n):
        if row.status != "measured":
            lines.setdefault((row.case, row.label, row.dtype, row.mode, row.status), row)
    cells = [
        [f"{row.case}: {row.label}", f"N={row.n} {row.dtype} {row.mode}", row.status, row.note]
        for row in lines.values()
    ]
    return [["", "first at", "", "why"], *cells]


def extra(lines: list[dict]) -> Table:
    """Flat dictionaries as a table: their keys in order of appearance."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    return [keys, *([_plain_cell(line.get(key)) for key in keys] for line in lines)]


def seconds(value: float) -> str:
    value, unit = (value * 1e3, "ms") if value < 0.1 else (value, "s")
    return f"{value:#.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def mib(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f} MiB" if value < 10240 else f"{value / 1024:.1f} GiB"


def spread(values: dict, unit: str = "") -> str:
    """Such as 1.56x (1.50-1.61)."""
    return f"{values['median']:.2f}{unit} ({values['low']:.2f}-{values['high']:.2f})"


def _by(results: Results, kind: str, field: str, letter: str, wanted: dict) -> Table:
    values = sorted(results.names(field, **wanted))
    lines = []
    for peer in results.names("peer", **wanted):
        rows = {getattr(row, field): row for row in results.find(peer=peer, **wanted)}
        label = next(iter(rows.values())).label
        lines.append([label, *(_cell(rows.get(value), KINDS[kind]) for value in values)])
    return [["", *(f"{letter}={value}" for value in values)], *lines]


def _cell(row: Row | None, cell: Callable[[Row], str]) -> str:
    """A dash where it was not run, the status where it failed or had no room; a wrong result's time says so."""
    if row is None or row.status == "not run":
        return "-"
    if row.status == "wrong" and row.seconds:
        return f"{cell(row)} (wrong)"
    return cell(row) if row.status == "measured" else row.status


def _plain_cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
