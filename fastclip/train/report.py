"""The pictures of a run, drawn with matplotlib (no display needed) and written all or nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastclip.data.cache import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, ACCENT, WARM, GREEN, FRAME = "#1d2733", "#8793a3", "#2563eb", "#ea580c", "#16a34a", "#c3cad4"
LEGEND = "green: the name asked for · solid: a face never trained on · dashed: a trained one · number: cosine"


@dataclass(frozen=True)
class Found:
    """One picture that a search found: `image` uint8 [S, S]; `score` is the cosine."""

    name: str
    face: str
    score: float
    image: np.ndarray
    held_out: bool


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches that belongs to no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def gallery(rows: Sequence[tuple[str, Sequence[Found]]], path: Path, title: str) -> None:
    """One row per query, best picture first; at least one row."""
    # Inches; never narrower than the title.
    cell, row, left, top = 1.3, 1.72, 2.3, 0.85
    width = left + cell * max(5, *(len(found) for _, found in rows))
    height = top + row * len(rows)
    figure = new_figure(width, height)
    heading = {"ha": "center", "va": "center"}
    figure.text(0.5, 1 - 0.25 / height, title, fontsize=12, fontweight="bold", color=INK, **heading)
    figure.text(0.5, 1 - 0.52 / height, LEGEND, fontsize=8, color=SOFT, **heading)
    for r, (query, found) in enumerate(rows):
        bottom = height - top - row * r - 1.02
        x, y = (left - 0.25) / width, (bottom + 0.51) / height
        text = textwrap.fill(query, 20, max_lines=4, placeholder="…")
        figure.text(x, y, text, ha="right", va="center", fontsize=10.5, fontweight="bold", color=INK)
        for c, hit in enumerate(found):
            place = ((left + cell * c) / width, bottom / height, 1.02 / width, 1.02 / height)
            draw_found(figure.add_axes(place), hit, hit.name == query.strip().lower())
    save_figure(figure, path)


def draw_found(axes: Axes, hit: Found, right: bool) -> None:
    """The picture in its frame, with name and score below."""
    axes.imshow(255 - hit.image, cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GREEN if right else FRAME)
        spine.set_linewidth(2.5 if right else 1.2)
        spine.set_linestyle("-" if hit.held_out else (0, (3, 2)))
    lines = [*textwrap.wrap(hit.name, 20, max_lines=3, placeholder="…"), f"{hit.score:.2f}"]
    below = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 6.6, "linespacing": 1.15}
    axes.text(0.5, -0.06, "\n".join(lines), color=GREEN if right else INK, **below)


def confusion(matrix: np.ndarray, labels: Sequence[str], path: Path, title: str) -> None:
    """`matrix` int [C, C], row = truth, column = answer; colours are shares of the row."""
    figure = new_figure(6.6, 6.2)
    axes = figure.subplots()
    share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            axes.text(
                column,
                row,
                str(count),
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if share[row, column] > 0.5 else INK,
            )
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("the model's answer")
    axes.set_ylabel("what was written")
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=12, fontweight="bold", color=INK, pad=12)
    figure.tight_layout()
    save_figure(figure, path)
