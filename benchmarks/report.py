"""How it is shown as text: tables on a terminal and, between markers, in documents.

    python -m benchmarks.report benchmarks/results/X.json                         print the tables
    python -m benchmarks.report benchmarks/results/X.json --docs README.md ...    rewrite them in these files

A document names a table by `<!-- bench:SUITE-TABLE -->` ... `<!-- /bench -->`, where SUITE is cpu or gpu and TABLE is
    machine, exponent, not-run, capacity, extra-NAME,
    KIND-DTYPE-MODE of the CLIP loss, or CASE-KIND-DTYPE-MODE of another case, such as ranks-time-fp32-both-directions,
    width-KIND, the CLIP loss over D;
KIND is time, ratio, memory, floor or error, DTYPE fp32, bf16 or fp16, MODE forward, training (forward + backward) or
the case's own words. A file of one suite leaves the other suite's tables alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastclip.benchmarks import noise, tables
from fastclip.benchmarks.capacity import capacity_table
from fastclip.benchmarks.case import TRAINING
from fastclip.benchmarks.machine import headline
from fastclip.benchmarks.results import Results, Row, load
from fastclip.benchmarks.tables import Table

MARKED = re.compile(r"(<!-- bench:(\w+?)-([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
COLUMNS = ("", "time", "spread", "vs first", "peak", "of floor", "of fp32's", "error")


def problem_table(rows: list[Row]) -> str:
    """All that was measured of one problem, for a terminal."""
    first = rows[0]
    timed = next((row for row in rows if row.floor_s), None)
    title = f"{first.case} N={first.n} D={first.d} {first.dtype} {first.mode}"
    if timed:
        title += f"   floor {tables.seconds(timed.floor_s)} at {timed.gemm_gflops:.0f} GFLOP/s ({timed.gemm_library})"
    lines = [COLUMNS] + [_cells(row) for row in rows if row.seconds]
    shown = [title, *_aligned(lines)] if len(lines) > 1 else [title]
    shown += [f"  {row.label}: {row.status}: {row.note}" for row in rows if row.status != "measured"]
    return "\n".join(shown) + "\n"


def extra_text(lines: list[dict]) -> str:
    """The table of another benchmark."""
    return _plain(tables.extra(lines))


def summary(results: Results) -> str:
    """Time and memory over N of the cases with several N, exponents, and where it was measured, for a terminal."""
    parts = []
    for case in results.names("case"):
        if len(results.names("n", case=case)) < 2:
            continue
        for dtype, mode in results.groups(case):
            parts += [f"{case}, {dtype}, {mode}: time", _plain(tables.by_size(results, "time", case, dtype, mode))]
            if mode != "forward" and any(row.peak_mib is not None for row in results.find(case=case)):
                memory = tables.by_size(results, "memory", case, dtype, mode)
                parts += [f"{case}, {dtype}, {mode}: peak memory above inputs and results", _plain(memory)]
    for name, lines in results.extra.items():
        parts += [name, extra_text(lines)]
    if results.find(case="clip"):
        exponents = tables.exponents(results)
        if len(exponents) > 1:
            parts += ["Time ~ N^p, fitted from N = 4096 to 16384", _plain(exponents)]
    return "\n".join([*parts, where(results)]).rstrip()


def where(results: Results) -> str:
    """Machine and date, and a warning where something else ran."""
    warning = noise.warning(results.parts, results.machine.get("cores", 0))
    return "\n\n".join(filter(None, (headline(results.machine) + ".", warning)))


def slug(mode: str) -> str:
    """A mode as it stands in a marker."""
    return "training" if mode == TRAINING else re.sub(r"[^a-z0-9]+", "-", mode.lower())


def named_table(results: Results, name: str) -> str:
    """The Markdown that belongs between the markers of TABLE = name. Raises ValueError for a name nobody knows."""
    if name == "machine":
        return where(results)
    if name == "exponent":
        return markdown(tables.exponents(results))
    if name == "not-run":
        return markdown(tables.not_run(results))
    if name == "capacity":
        return markdown(capacity_table(results))
    kind, _, rest = name.partition("-")
    if kind == "extra" and rest in results.extra:
        return markdown(tables.extra(results.extra[rest]))
    if kind == "width" and rest in tables.KINDS:
        return markdown(tables.by_width(results, rest))
    case, kind, rest = ("clip", kind, rest) if kind in tables.KINDS else (kind, *rest.partition("-")[::2])
    dtype, _, mode_slug = rest.partition("-")
    mode = next((mode for _, mode in results.groups(case) if slug(mode) == mode_slug), None)
    if kind not in tables.KINDS or mode is None or not results.find(case=case, dtype=dtype, mode=mode):
        raise ValueError(f"this results file has no table {name!r}; one would be time-fp32-training")
    return markdown(tables.by_size(results, kind, case, dtype, mode))


def rewrite(text: str, results: Results) -> str:
    """`text` with every marked table of this suite replaced by the measured one."""

    def fresh(match: re.Match) -> str:
        opening, suite, name, closing = match.groups()
        if suite != results.suite:
            return match.group(0)
        return f"{opening}{named_table(results, name)}\n{closing}"

    return MARKED.sub(fresh, text)


def markdown(table: Table) -> str:
    head, *lines = table
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"  {row.label}{' (wrong)' if row.status == 'wrong' else ''}",
        tables.time_cell(row),
        f"{tables.seconds(row.seconds['low'])} - {tables.seconds(row.seconds['high'])}",
        tables.ratio_cell(row),
        tables.memory_cell(row),
        tables.spread(row.share) if row.share else "",
        f"{row.fp32_share['median']:.2f}" if row.fp32_share and row.dtype != "fp32" else "",
        tables.error_cell(row),
    )


def _aligned(table: list) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in table)
    ]


def _plain(table: Table) -> str:
    return "\n".join("  " + line for line in _aligned(table)) + "\n"


@dataclass(frozen=True)
class ReportConfig:
    """Print the tables of a results file, or write them into documents between their markers."""

    results: tyro.conf.Positional[Path]
    """A file that `fastclip bench` wrote."""
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
