"""How it is shown as pictures: time, memory and share of the floor over N, for one case."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fastclip.benchmarks import capacity
from fastclip.benchmarks.case import TRAINING
from fastclip.benchmarks.machine import headline
from fastclip.benchmarks.results import Results, Row

# One colour and marker a peer in every picture; fastclip strong, the others lighter (Okabe and Ito's colours).
STYLES = {
    "cpu": ("#D55E00", "o"),
    "triton": ("#D55E00", "o"),
    "fastclip": ("#D55E00", "o"),
    "sigmoid": ("#D55E00", "o"),
    "eager": ("#E69F00", "s"),
    "dense": ("#333333", "D"),
    "dense-fp32": ("#8C8C8C", "d"),
    "openclip": ("#0072B2", "^"),
    "compile": ("#56B4E9", "v"),
    "chunked": ("#009E73", "P"),
}
SPARE = ("#CC79A7", "X")
OUT_OF_MEMORY = "out of memory"


def time_plot(results: Results, case: str, title: str) -> Figure:
    """Median seconds with the spread of the runs, log-log; a cross where a peer needs more than the machine has."""
    figure, panels = _panels(results, case, f"{title}: time of one call")
    for axes, rows in panels:
        for series in _series(rows):
            x, y = [row.n for row in series], [row.seconds["median"] for row in series]
            axes.plot(x, y, **style(series[0]))
            low, high = [row.seconds["low"] for row in series], [row.seconds["high"] for row in series]
            axes.fill_between(x, low, high, color=style(series[0])["color"], alpha=0.15, linewidth=0)
            _refused(axes, rows, series[0], x[-1], y[-1])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(short_seconds))
        axes.yaxis.set_minor_locator(NullLocator())
    return _finish(figure, panels, results)


def memory_plot(results: Results, case: str, title: str) -> Figure | None:
    """Peak MiB above inputs and results, log-log; a cross where a peer needs more than the machine has."""
    if not any(row.peak_mib for row in results.measured(case=case)):
        return None
    figure, panels = _panels(results, case, f"{title}: peak memory above inputs and results")
    for axes, rows in panels:
        for series in _series(rows):
            # A MiB is the grain of the measurement, and keeps a zero on a logarithmic axis.
            points = [(row.n, max(1.0, row.peak_mib)) for row in series if row.peak_mib is not None]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), **style(series[0]))
            _refused(axes, rows, series[0], *points[-1])
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(_mib))
        limit = results.machine["memory_gib"] * 1024
        axes.axhline(limit, color="#999999", linewidth=1, linestyle="--")
        whose = "the GPU's memory" if results.suite == "gpu" else "the machine's memory"
        place = {"transform": axes.get_yaxis_transform(), "va": "bottom", "fontsize": 7, "color": "#666666"}
        axes.text(0.01, limit, whose, **place)
    return _finish(figure, panels, results)


def floor_plot(results: Results, case: str, title: str) -> Figure | None:
    """Floor / time at the faster product, the features' dtype's or fp32's: 1 is the speed of matrix products alone."""
    if not any(row.share for row in results.measured(case=case)):
        return None
    figure, panels = _panels(results, case, f"{title}: share of the floor (1 = the matrix products alone)")
    for axes, rows in panels:
        for series in _series(rows):
            shares = [min(row.share, row.fp32_share, key=lambda share: share["median"]) for row in series]
            x, colour = [row.n for row in series], style(series[0])["color"]
            axes.plot(x, [share["median"] for share in shares], **style(series[0]))
            low, high = [share["low"] for share in shares], [share["high"] for share in shares]
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.axhline(1.0, color="#666666", linewidth=1, linestyle="--")
        axes.set_ylim(bottom=0)
    return _finish(figure, panels, results, ("measured",))


def capacity_plot(results: Results) -> Figure | None:
    """The largest batch that fits over the memory there is, log-log."""
    found = capacity.capacities(results)
    if not found:
        return None
    best = max(found, key=lambda peer: (peer.row.ours, peer.largest(capacity.GIGABYTES[-1])))
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.subplots()
    for peer in reversed(found):
        points = [(size, peer.largest(size)) for size in capacity.GIGABYTES if peer.largest(size) > 1]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), **style(peer.row))
        if peer in (best, *(each for each in found if each.row.peer == "dense")):
            place = {"textcoords": "offset points", "ha": "center", "size": 8, "color": style(peer.row)["color"]}
            for x, y in points:
                axes.annotate(_short(y), (x, y), (-3, 8 if peer is best else -14), **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(capacity.GIGABYTES, [f"{size} GB" for size in capacity.GIGABYTES])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_ylabel("Largest batch N")
    axes.set_title("Largest batch whose CLIP loss fits (no model counted)", fontsize=13, fontweight="bold")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    lines = {line.get_label(): line for line in axes.lines}
    labels = [peer.row.label for peer in found if peer.row.label in lines]
    where = f"at D = {found[0].row.d}, {found[0].row.dtype}; {headline(results.machine)}"
    figure.legend(
        [lines[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
        title=f"Extended from measured peaks {where}",
        title_fontsize=6,
    )
    return figure


def style(row: Row) -> dict:
    """How a peer's line looks everywhere."""
    colour, marker = STYLES.get(row.peer, SPARE)
    return {
        "color": colour,
        "marker": marker,
        "fillstyle": "full" if row.ours else "none",  # so that equal lines both show
        "linewidth": 2.4 if row.ours else 1.5,
        "markersize": 6 if row.ours else 7,
        "label": row.label,
    }


def _refused(axes: Axes, rows: list[Row], last: Row, n: int, value: float) -> None:
    """A dotted line, as N^2, from the last measured point to the first N that the machine has no room for."""
    refused = [row.n for row in rows if row.peer == last.peer and row.status == OUT_OF_MEMORY and row.n > n]
    if not refused:
        return
    colour, there = style(last)["color"], value * (refused[0] / n) ** 2
    axes.plot([n, refused[0]], [value, there], color=colour, linestyle=":", linewidth=1.2)
    axes.plot(refused[:1], [there], color=colour, marker="x", markersize=8, markeredgewidth=2, linestyle="none")
    if last.peer == "dense":
        place = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(OUT_OF_MEMORY, (refused[0], there), (-6, 4), fontsize=8, **place)


def _panels(results: Results, case: str, title: str) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """One panel a dtype (down) and mode (across) that has measured rows, at the case's main width."""
    at = {"case": case, "d": results.width(case)}
    groups = [(dtype, mode) for dtype, mode in results.groups(case) if results.measured(dtype=dtype, mode=mode, **at)]
    dtypes, modes = (list(dict.fromkeys(values)) for values in zip(*groups, strict=True))
    size = (1 + 5.2 * len(modes), 1.6 + 3.6 * len(dtypes))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(dtypes), len(modes), squeeze=False, sharex=True)
    figure.suptitle(title if len(modes) > 1 else title.replace(" (", "\n("), fontsize=14, fontweight="bold")
    panels = []
    for i, dtype in enumerate(dtypes):
        for j, mode in enumerate(modes):
            axes = grid[i][j]
            if (dtype, mode) not in groups:
                axes.set_axis_off()
                continue
            axes.set_title(f"{dtype}, {'forward + backward' if mode == TRAINING else mode}", fontsize=11)
            panels.append((axes, results.find(dtype=dtype, mode=mode, **at)))
    return figure, panels


def _finish(
    figure: Figure,
    panels: list[tuple[Axes, list[Row]]],
    results: Results,
    shown_status: tuple[str, ...] = ("measured", OUT_OF_MEMORY),
) -> Figure:
    shown_rows = [row for _, rows in panels for row in rows if row.status in shown_status]
    sizes = sorted({row.n for row in shown_rows})
    for axes, _ in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("N")
    shown = {line.get_label(): line for axes, _ in panels for line in axes.lines}
    labels = [label for label in results.names("label") if label in shown]
    columns = len({axes.get_subplotspec().colspan.start for axes, _ in panels})
    figure.legend(
        [shown[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=2 * columns,
        frameon=False,
        title=f"D = {shown_rows[0].d}; {headline(results.machine)}",
        title_fontsize=8 if columns > 1 else 6,
        fontsize=9,
    )
    return figure


def _series(rows: list[Row]) -> Iterator[list[Row]]:
    """The measured rows of each peer by N, fastclip last so that it lies on top."""
    peers = dict.fromkeys(row.peer for row in reversed(rows))
    for peer in peers:
        series = [row for row in rows if row.peer == peer and row.status == "measured"]
        if series:
            yield sorted(series, key=lambda row: row.n)


def short_seconds(value: float, _position: int) -> str:
    """A tick's label."""
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _mib(value: float, _position: int) -> str:
    return f"{value:g} MiB" if value < 1024 else f"{value / 1024:g} GiB"


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"
