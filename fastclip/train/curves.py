"""The curves of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastclip.evaluate.drawing import ACCENT, INK, SOFT, WARM, new_figure, save_figure


def curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have `name`."""
    found = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in found], [record[name] for record in found]


def draw_curves(records: list[dict[str, Any]], batch: int, path: Path, title: str) -> None:
    """Loss (left) with chance ln(batch) and accuracies (right); below, the logit scale. Written as a PNG."""
    figure = new_figure(8, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, losses = curve(records, "loss")
    marker = {"marker": "o" if len(steps) < 20 else None, "markersize": 4}
    top.plot(steps, losses, color=ACCENT, **marker)
    for name, style in (("held_out_loss", "--"),):
        at, values = curve(records, name)
        if at:
            top.plot(at, values, color=ACCENT, linestyle=style, marker="o", markersize=3, label="held out")
            top.legend(loc="upper left", frameon=False)
    draw_chance(top, batch)
    top.set_ylabel("contrastive loss", color=ACCENT)
    top.set_ylim(bottom=0)
    right = top.twinx()
    at, accuracy = curve(records, "accuracy")
    right.plot(at, [100 * value for value in accuracy], color=WARM, **marker)
    right.set_ylim(0, 100)
    right.set_ylabel("right pair found in the batch, %", color=WARM)
    bottom.plot(*curve(records, "scale"), color=INK, **marker)
    bottom.set_ylabel("logit scale")
    bottom.set_xlabel(f"step ({batch:,} pairs each)")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, right, bottom):
        axes.spines["top"].set_visible(False)
        axes.margins(x=0.01)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    figure.tight_layout()
    save_figure(figure, path)


def draw_chance(axes: Any, batch: int) -> None:
    """A dotted line at the loss of a model that knows nothing."""
    chance = math.log(batch)
    axes.axhline(chance, color=SOFT, linestyle=":", linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(f"chance: ln {batch:,}", (1, chance), (0, -4), color=SOFT, fontsize=9, **place)
