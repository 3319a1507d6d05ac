"""How it is shown as text: tables on a terminal and, between markers, in documents.

    python -m benchmarks.report benchmarks/results/X.json                         print the tables
    python -m benchmarks.report benchmarks/results/X.json --docs README.md ...    rewrite them in these files

A document names a table by `<!-- bench:SUITE-TABLE -->` ... `<!-- /bench -->`, where SUITE is cpu or gpu and TABLE is
machine, time-DTYPE-MODE, memory-DTYPE-MODE, floor-DTYPE-MODE, error-DTYPE-MODE, ratio-DTYPE-MODE or exponent; DTYPE is
fp32, bf16 or fp16 and MODE forward or training. A file of one suite leaves the other suite's tables alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.machine import headline, noise_warning
from benchmarks.problems import FORWARD, TRAINING
from benchmarks.results import Results, Row, load

MARKED = re.compile(r"(<!-- bench:(\w+)-([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
MODE_NAMES = {"forward": FORWARD, "training": TRAINING}
GROUP_COLUMNS = ("", "time", "range", "vs first", "peak", "of floor", "of fp32's", "error")


def group_table(rows: list[Row]) -> str:
    """All that was measured of one N, dtype and mode, for a terminal."""
    first = rows[0]
    timed = next((row for row in rows if row.floor_s), None)
    title = f"N={first.n} D={first.d} {first.dtype} {first.mode}"
    if timed:
        title += f"   floor {_seconds(timed.floor_s)} at {timed.gemm_gflops:.0f} GFLOP/s ({timed.gemm_library})"
    columns = [GROUP_COLUMNS] + [_group_cells(row) for row in rows if row.status == "measured"]
    lines = [title, *_aligned(columns)] if len(columns) > 1 else [title]
    lines += [f"  {row.label}: {row.status}: {row.note}" for row in rows if row.status != "measured"]
    return "\n".join(lines) + "\n"


def summary(results: Results) -> str:
    """Time over N of every peer, exponents, and where it was measured, for a terminal."""
    parts = []
    for dtype, mode in results.groups():
        slug = next(key for key, value in MODE_NAMES.items() if value == mode)
        parts += [f"{dtype} {mode}, seconds", _plain(time_table(results, dtype, mode))]
        if slug == "training":
            parts += [f"{dtype} {mode}, peak memory", _plain(memory_table(results, dtype, mode))]
    exponents = exponent_table(results)
    if len(exponents) > 1:
        parts += ["Time ~ N^p, fitted from N = 4096 to 16384", _plain(exponents)]
    return "\n".join([*parts, headline(results.machine), noise_warning(results.machine) or ""]).rstrip()


Table = list[list[str]]


def time_table(results: Results, dtype: str, mode: str) -> Table:
    """Median seconds, peers by N."""
    return _by_size(results, dtype, mode, lambda row: _seconds(row.seconds["median"]))


def ratio_table(results: Results, dtype: str, mode: str) -> Table:
    """How many times as long as the first peer in the same round (median), peers by N."""
    return _by_size(results, dtype, mode, lambda row: f"{row.ratio['median']:.2f}x" if row.ratio else "")


def memory_table(results: Results, dtype: str, mode: str) -> Table:
    """Peak MiB above inputs and gradients, peers by N."""
    return _by_size(results, dtype, mode, lambda row: _mib(row.peak_mib))


def floor_table(results: Results, dtype: str, mode: str) -> Table:
    """Floor / time, peers by N; for 16-bit features the fp32 floor's share in parentheses."""
    return _by_size(results, dtype, mode, _shares)


def error_table(results: Results, dtype: str, mode: str) -> Table:
    """The worst relative error of loss and gradients against float64, peers by N."""
    return _by_size(results, dtype, mode, lambda row: f"{max(row.error.values()):.0e}")


def exponent_table(results: Results) -> Table:
    """p of time ~ N^p, peers by dtype and mode."""
    groups = [(dtype, mode) for dtype, mode in results.groups()]
    lines = []
    for peer in results.names("peer"):
        found = [results.exponent(peer=peer, dtype=dtype, mode=mode) for dtype, mode in groups]
        if any(found):
            label = results.find(peer=peer)[0].label
            lines.append([label, *("" if p is None else f"{p:.2f}" for p in found)])
    return [["", *(f"{dtype} {mode}" for dtype, mode in groups)], *lines]


TABLES: dict[str, Callable[[Results, str, str], Table]] = {
    "time": time_table,
    "ratio": ratio_table,
    "memory": memory_table,
    "floor": floor_table,
    "error": error_table,
}


def named_table(results: Results, name: str) -> str:
    """The Markdown that belongs between the markers of TABLE = name. Raises ValueError for a name nobody knows."""
    if name == "machine":
        return "\n\n".join(filter(None, (headline(results.machine) + ".", noise_warning(results.machine))))
    if name == "exponent":
        return _markdown(exponent_table(results))
    kind, _, rest = name.partition("-")
    dtype, _, mode = rest.partition("-")
    if kind not in TABLES or mode not in MODE_NAMES:
        raise ValueError(f"no table is called {name!r}; they are machine, exponent and e.g. time-fp32-training")
    table = TABLES[kind](results, dtype, MODE_NAMES[mode])
    if len(table) == 1:
        raise ValueError(f"this results file has no rows for table {name!r}")
    return _markdown(table)


def rewrite(text: str, results: Results) -> str:
    """`text` with every marked table of this suite replaced by the measured one."""

    def fresh(match: re.Match) -> str:
        opening, suite, name, closing = match.groups()
        if suite != results.suite:
            return match.group(0)
        return f"{opening}{named_table(results, name)}\n{closing}"

    return MARKED.sub(fresh, text)


def _group_cells(row: Row) -> tuple[str, ...]:
    return (
        "  " + row.label,
        _seconds(row.seconds["median"]),
        f"{_seconds(row.seconds['low'])} - {_seconds(row.seconds['high'])}",
        f"{row.ratio['median']:.2f}x" if row.ratio else "",
        _mib(row.peak_mib),
        f"{row.share:.2f}",
        f"{row.fp32_share:.2f}" if row.dtype != "fp32" else "",
        f"{max(row.error.values()):.0e}",
    )


def _by_size(results: Results, dtype: str, mode: str, cell: Callable[[Row], str]) -> Table:
    sizes = sorted(results.names("n", dtype=dtype, mode=mode))
    lines = []
    for peer in results.names("peer", dtype=dtype, mode=mode):
        rows = {row.n: row for row in results.find(peer=peer, dtype=dtype, mode=mode)}
        label = next(iter(rows.values())).label
        lines.append([label, *(_cell(rows.get(n), cell) for n in sizes)])
    return [["", *(f"N={n}" for n in sizes)], *lines]


def _cell(row: Row | None, cell: Callable[[Row], str]) -> str:
    """A dash where it was not run, the status where it failed or had no room."""
    if row is None or row.status == "not run":
        return "-"
    return cell(row) if row.status == "measured" else row.status


def _shares(row: Row) -> str:
    return f"{row.share:.2f}" if row.dtype == "fp32" else f"{row.share:.2f} ({row.fp32_share:.2f})"


def _seconds(value: float) -> str:
    value, unit = (value * 1e3, "ms") if value < 0.1 else (value, "s")
    return f"{value:#.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _mib(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f} MiB" if value < 10240 else f"{value / 1024:.1f} GiB"


def _aligned(table: list) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in table)
    ]


def _plain(table: Table) -> str:
    return "\n".join("  " + line for line in _aligned(table)) + "\n"


def _markdown(table: Table) -> str:
    head, *lines = table
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


@dataclass(frozen=True)
class ReportConfig:
    """Print the tables of a results file, or write them into documents between their markers."""

    results: tyro.conf.Positional[Path]
    """A file that `python -m benchmarks` wrote."""
    docs: tuple[Path, ...] = ()
    """Documents to rewrite; nothing is printed then."""


def main(config: ReportConfig) -> None:
    results = load(config.results)
    if not config.docs:
        print(summary(results))
    for path in config.docs:
        path.write_text(rewrite(path.read_text(), results))


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
