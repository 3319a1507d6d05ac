"""How it is shown as pictures: time, memory and share of the floor over N, PNG beside the results file."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.machine import headline
from benchmarks.problems import TRAINING
from benchmarks.results import Results, Row

# One colour and marker a peer in every picture; fastclip strong, the others lighter (Okabe and Ito's colours).
STYLES = {
    "cpu": ("#D55E00", "o"),
    "eager": ("#E69F00", "s"),
    "dense": ("#333333", "D"),
    "dense-fp32": ("#8C8C8C", "d"),
    "openclip": ("#0072B2", "^"),
    "compile": ("#56B4E9", "v"),
    "chunked": ("#009E73", "P"),
}
SPARE = ("#CC79A7", "X")
DPI = 150


def save(results: Results, path: Path) -> list[Path]:
    """Draws every picture there is data for and returns their paths."""
    written = []
    if not results.measured():
        return written
    for name, draw in (("time", time_plot), ("memory", memory_plot), ("floor", floor_plot)):
        figure = draw(results)
        if figure is None:
            continue
        picture = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(picture, dpi=DPI, facecolor="white")
        plt.close(figure)
        written.append(picture)
    return written


def time_plot(results: Results) -> Figure:
    """Median seconds with the whole range of runs, log-log."""
    figure, panels = _panels(results, "Time of one call")
    for axes, rows in panels:
        for series in _series(rows):
            x, y = [row.n for row in series], [row.seconds["median"] for row in series]
            axes.plot(x, y, **_style(series[0]))
            low, high = [row.seconds["low"] for row in series], [row.seconds["high"] for row in series]
            axes.fill_between(x, low, high, color=_style(series[0])["color"], alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=16))
        axes.yaxis.set_major_formatter(FuncFormatter(_seconds))
        axes.yaxis.set_minor_locator(NullLocator())
    return _finish(figure, panels, results)


def memory_plot(results: Results) -> Figure | None:
    """Peak MiB above inputs and gradients, log-log; a cross where a peer needs more than the machine has."""
    if not any(row.peak_mib for row in results.measured()):
        return None
    figure, panels = _panels(results, "Peak memory above inputs and gradients")
    for axes, rows in panels:
        for series in _series(rows):
            # A MiB is the grain of the measurement, and keeps a zero on a logarithmic axis.
            points = [(row.n, max(1.0, row.peak_mib)) for row in series if row.peak_mib is not None]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), **_style(series[0]))
            _out_of_memory(axes, rows, series[0], *points[-1])
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(_mib))
    return _finish(figure, panels, results)


def floor_plot(results: Results) -> Figure:
    """Floor / time at the faster GEMM, the features' dtype's or fp32's: 1 is the speed of the matrix products alone."""
    figure, panels = _panels(results, "Share of the floor (1 = the matrix products alone, at torch's fastest rate)")
    for axes, rows in panels:
        for series in _series(rows):
            shares = [min(row.share, row.fp32_share) for row in series]
            axes.plot([row.n for row in series], shares, **_style(series[0]))
        axes.axhline(1.0, color="#666666", linewidth=1, linestyle="--")
        axes.set_ylim(bottom=0)
    return _finish(figure, panels, results)


def _out_of_memory(axes: Axes, rows: list[Row], last: Row, n: int, mib: float) -> None:
    """A dotted line, as N^2, from the last measured point to the first N that the machine has no room for."""
    refused = [row.n for row in rows if row.peer == last.peer and row.status == "out of memory"]
    if not refused:
        return
    colour, needed = _style(last)["color"], mib * (refused[0] / n) ** 2
    axes.plot([n, refused[0]], [mib, needed], color=colour, linestyle=":", linewidth=1.2)
    axes.plot(refused[:1], [needed], color=colour, marker="x", markersize=8, markeredgewidth=2)
    if last.peer == "dense":
        place = {"textcoords": "offset points", "ha": "right", "va": "center"}
        axes.annotate("out of memory", (refused[0], needed), (-8, 0), fontsize=8, **place)


def _panels(results: Results, title: str) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """One panel a dtype (down) and mode (across) that has measured rows."""
    groups = [(dtype, mode) for dtype, mode in results.groups() if results.measured(dtype=dtype, mode=mode)]
    dtypes, modes = (list(dict.fromkeys(values)) for values in zip(*groups, strict=True))
    size = (1 + 5.2 * len(modes), 1.6 + 3.6 * len(dtypes))
    figure, grid = plt.subplots(len(dtypes), len(modes), figsize=size, squeeze=False, sharex=True, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    panels = []
    for i, dtype in enumerate(dtypes):
        for j, mode in enumerate(modes):
            axes, rows = grid[i][j], results.find(dtype=dtype, mode=mode)
            axes.set_title(f"{dtype}, {'forward + backward' if mode == TRAINING else mode}", fontsize=11)
            panels.append((axes, rows))
    return figure, panels


def _finish(figure: Figure, panels: list[tuple[Axes, list[Row]]], results: Results) -> Figure:
    sizes = sorted({row.n for row in results.measured()})
    for axes, _ in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("Batch size N")
    shown = {line.get_label(): line for axes, _ in panels for line in axes.lines}
    labels = [label for label in results.names("label") if label in shown]
    figure.legend(
        [shown[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=2 * len({panel.get_subplotspec().colspan.start for panel, _ in panels}),
        frameon=False,
        title=f"D = {results.settings['d']}; {headline(results.machine)}",
        title_fontsize=8,
    )
    return figure


def _series(rows: list[Row]) -> Iterator[list[Row]]:
    """The measured rows of each peer by N, fastclip last so that it lies on top."""
    peers = dict.fromkeys(row.peer for row in reversed(rows))
    for peer in peers:
        series = [row for row in rows if row.peer == peer and row.status == "measured"]
        if series:
            yield sorted(series, key=lambda row: row.n)


def _style(row: Row) -> dict:
    colour, marker = STYLES.get(row.peer, SPARE)
    ours = row.label.startswith("fastclip")
    return {
        "color": colour,
        "marker": marker,
        "fillstyle": "full" if ours else "none",  # so that equal lines both show
        "linewidth": 2.4 if ours else 1.5,
        "markersize": 6 if ours else 7,
        "label": row.label,
    }


def _seconds(value: float, _position: int) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _mib(value: float, _position: int) -> str:
    return f"{value:g} MiB" if value < 1024 else f"{value / 1024:g} GiB"
