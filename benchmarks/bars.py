"""One picture for the cases with few sizes: a panel a problem, a bar a peer, labelled with time and memory."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastclip.benchmarks import tables
from fastclip.benchmarks.machine import headline
from fastclip.benchmarks.plots import short_seconds
from fastclip.benchmarks.results import Results, Row

OURS, OTHERS = "#E07B39", "#A9B8C6"


def bars(results: Results, cases: dict[str, str]) -> Figure | None:
    """Median seconds with the spread of the runs at each case's largest N that several peers were measured at.

    cases: name -> title.
    """
    panels = [(title, rows) for case, title in cases.items() for rows in _problems(results, case)]
    if not panels:
        return None
    heights = [0.7 + 0.32 * len(rows) for _, rows in panels]
    figure = Figure(figsize=(8, 0.9 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, rows) in zip(grid[:, 0], panels, strict=True):
        _panel(axes, title, rows)
    figure.supxlabel(f"time of one call; memory above inputs and results. {headline(results.machine)}", fontsize=7)
    return figure


def _problems(results: Results, case: str) -> list[list[Row]]:
    """The rows of each mode's largest N, where at least two were measured."""
    found = []
    for dtype, mode in results.groups(case):
        rows = results.measured(case=case, dtype=dtype, mode=mode, d=results.width(case))
        sizes = [row.n for row in rows]
        shared = [n for n in sizes if sizes.count(n) > 1]
        if shared and dtype == "fp32":
            found.append([row for row in rows if row.n == max(shared)])
    return found


def _panel(axes, title: str, rows: list[Row]) -> None:
    first, slowest = rows[0], max(row.seconds["high"] for row in rows)
    for place, row in enumerate(rows):
        times = row.seconds
        off = [[times["median"] - times["low"]], [times["high"] - times["median"]]]
        axes.barh(place, times["median"], color=OURS if row.ours else OTHERS, height=0.62)
        axes.errorbar(times["median"], place, xerr=off, color="#333333", capsize=2, linewidth=1)
        told = [tables.time_cell(row), tables.memory_cell(row)]
        axes.annotate(", ".join(filter(None, told)), (times["high"], place), (5, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, slowest * 1.25)
    axes.set_title(f"{title}: {first.mode}, N = {first.n:,}, D = {first.d}", fontsize=10, loc="left")
    axes.xaxis.set_major_formatter(short_seconds)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
