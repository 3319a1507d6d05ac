"""The curves of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastclip.evaluate.drawing import ACCENT, INK, SOFT, WARM, new_figure, save_figure

# Evaluations on the right axis: record's name, label, line.
RIGHT = (
    ("accuracy", "in the batch", "-"),
    ("text_to_image_recall@1", "held out, text to image", "--"),
    ("zero_shot_top-1", "zero-shot", ":"),
)


def curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have `name`."""
    found = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in found], [record[name] for record in found]


def draw_curves(
    records: list[dict[str, Any]], batch: int, path: Path, title: str, *, chance: float | None = None
) -> None:
    """Losses (left), accuracies (right) and the logit scale below, written as a PNG.

    `chance`: the training loss of a model that knows nothing, drawn as a dotted line; ln(batch) if not given, NaN for
    none.
    """
    figure = new_figure(8, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    right = top.twinx()
    steps, losses = curve(records, "loss")
    marker = {"marker": "o" if len(steps) < 20 else None, "markersize": 4}
    lines = top.plot(steps, losses, color=ACCENT, label="loss", **marker)
    at, held_out = curve(records, "held_out_loss")
    if at:
        pairs = max(curve(records, "held_out_pairs")[1])
        few = {"marker": "o", "markersize": 3, "linestyle": "--"}
        lines += top.plot(at, held_out, color=ACCENT, label=f"loss, {pairs:,} held-out pairs", **few)
    for name, label, style in RIGHT:
        at, values = curve(records, name)
        if at:
            percent = [100 * value for value in values]
            lines += right.plot(at, percent, color=WARM, linestyle=style, label=f"found first, {label}", **marker)
    if len(lines) > 2:
        figure.legend(handles=lines, loc="lower center", ncols=3, frameon=False, fontsize=8)
    draw_chance(top, math.log(batch) if chance is None else chance, f"chance: ln {batch:,}")
    top.set_ylabel("contrastive loss", color=ACCENT)
    top.set_ylim(bottom=0)
    right.set_ylim(0, 100)
    right.set_ylabel("right pair found first, %", color=WARM)
    bottom.plot(*curve(records, "scale"), color=INK, **marker)
    bottom.ticklabel_format(useOffset=False)
    bottom.set_ylabel("logit scale")
    bottom.set_xlabel(f"step ({batch:,} pairs each)")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, right, bottom):
        axes.spines["top"].set_visible(False)
        axes.margins(x=0.01)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    figure.tight_layout(rect=(0, 0.07 if len(lines) > 2 else 0, 1, 1))
    save_figure(figure, path)


def draw_chance(axes: Any, chance: float, text: str) -> None:
    """A dotted line and its label; nothing for NaN."""
    if math.isfinite(chance):
        axes.axhline(chance, color=SOFT, linestyle=":", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "top"}
        axes.annotate(text, (1, chance), (0, -4), color=SOFT, fontsize=9, **place)
