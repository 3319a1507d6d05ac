"""Pictures of results, drawn with matplotlib (no display needed) and written all or nothing."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastclip.data.cache import write_atomic
from fastclip.evaluate.files import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, ACCENT, WARM, GREEN, FRAME = "#1d2733", "#8793a3", "#2563eb", "#ea580c", "#16a34a", "#c3cad4"
# With more classes their counts and names cannot be read.
MOST_COUNTS, MOST_NAMES = 30, 80


@dataclass(frozen=True)
class Tile:
    """A picture of a gallery: `image` uint8 [H, W] or [H, W, 3] as it is to look; `score` a cosine.

    `right`: in green; `dashed`: in a dashed frame.
    """

    image: np.ndarray
    caption: str
    score: float
    right: bool = False
    dashed: bool = False


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches that belongs to no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box: no reason to say so on the terminal.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        write_atomic(path, lambda file: figure.savefig(file, format="png"))


def draw_gallery(rows: Sequence[tuple[str | np.ndarray, Sequence[Tile]]], path: Path, title: str, legend: str) -> None:
    """One row per query (words, or a picture as in Tile), best tile first; at least one row."""
    # Inches; never narrower than the title.
    cell, row, left, top = 1.3, 1.72, 2.3, 0.85
    width = left + cell * max(5, *(len(tiles) for _, tiles in rows))
    height = top + row * len(rows)
    figure = new_figure(width, height)
    heading = {"ha": "center", "va": "center"}
    figure.text(0.5, 1 - 0.25 / height, plain(title), fontsize=12, fontweight="bold", color=INK, **heading)
    figure.text(0.5, 1 - 0.52 / height, plain(legend), fontsize=8, color=SOFT, **heading)
    for r, (query, tiles) in enumerate(rows):
        bottom = height - top - row * r - 1.02
        if isinstance(query, str):
            x, y = (left - 0.25) / width, (bottom + 0.51) / height
            text = textwrap.fill(plain(query), 20, max_lines=4, placeholder="…")
            figure.text(x, y, text, ha="right", va="center", fontsize=10.5, fontweight="bold", color=INK)
        else:
            place = (0.75 / width, (bottom - 0.14) / height, 1.3 / width, 1.3 / height)
            frame(figure.add_axes(place), query, ACCENT, 2.5, "-")
        for c, tile in enumerate(tiles):
            place = ((left + cell * c) / width, bottom / height, 1.02 / width, 1.02 / height)
            draw_tile(figure.add_axes(place), tile)
    save_figure(figure, path)


def draw_tile(axes: Axes, tile: Tile) -> None:
    """The picture in its frame, with caption and score below."""
    colour, line = (GREEN, 2.5) if tile.right else (FRAME, 1.2)
    frame(axes, tile.image, colour, line, (0, (3, 2)) if tile.dashed else "-")
    lines = [*textwrap.wrap(plain(tile.caption), 20, max_lines=3, placeholder="…"), f"{tile.score:.2f}"]
    below = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 6.6, "linespacing": 1.15}
    axes.text(0.5, -0.06, "\n".join(lines), color=GREEN if tile.right else INK, **below)


def frame(axes: Axes, image: np.ndarray, colour: str, line: float, style: object) -> None:
    """`image` whole and undistorted in a square frame."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    high, wide = image.shape[:2]
    half = max(high, wide) / 2
    axes.set_xlim(wide / 2 - 0.5 - half, wide / 2 - 0.5 + half)
    axes.set_ylim(high / 2 - 0.5 + half, high / 2 - 0.5 - half)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=line, linestyle=style)


def draw_confusion(matrix: np.ndarray, labels: Sequence[str], path: Path, title: str) -> None:
    """`matrix` int [C, C], row = truth, column = answer; colours are shares of the row."""
    classes = len(labels)
    # Room for the counts, then for the names, then for neither.
    side = 4.2 + (0.36 * min(classes, MOST_COUNTS) if classes <= MOST_COUNTS else 0.12 * min(classes, MOST_NAMES))
    figure = new_figure(max(6.6, side), max(6.2, side - 0.4))
    figure.set_layout_engine("tight")
    axes = figure.subplots()
    share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if classes <= MOST_COUNTS:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if share[row, column] > 0.5 else INK
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8.5, color=colour)
    if classes <= MOST_NAMES:
        short = [textwrap.shorten(plain(label), 28, placeholder="…") or "?" for label in labels]
        size = 10 if classes <= MOST_COUNTS else 6
        axes.set_xticks(range(classes), short, rotation=35, ha="right", rotation_mode="anchor", fontsize=size)
        axes.set_yticks(range(classes), short, fontsize=size)
    axes.set_xlabel("the model's answer")
    axes.set_ylabel("what it is")
    axes.tick_params(length=0)
    axes.set_title(plain(title), fontsize=12, fontweight="bold", color=INK, pad=12)
    save_figure(figure, path)


def plain(text: str) -> str:
    """Text as it is: a dollar would begin a formula."""
    return printable(text).replace("$", r"\$")
