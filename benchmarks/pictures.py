"""All pictures of a results file, by name, each with a sentence that says what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from fastclip.benchmarks.bars import bars
from fastclip.benchmarks.plots import capacity_plot, floor_plot, memory_plot, time_plot
from fastclip.benchmarks.results import Results

DPI = 110
TITLES = {
    "clip": "CLIP loss",
    "siglip": "SigLIP loss",
    "ranks": "Retrieval ranks",
    "topk": "Top-k search",
    "step": "Training step",
    "loading": "Data loading",
}
OVER_N = ("clip", "siglip", "ranks")  # cases with pictures over N


class Picture(NamedTuple):
    name: str
    figure: Figure
    caption: str


def pictures(results: Results) -> list[Picture]:
    """Every picture there is data for."""
    found = []
    for case in OVER_N:
        if len({row.n for row in results.measured(case=case)}) < 2:
            continue
        prefix, title = "" if case == "clip" else f"{case}-", TITLES[case]
        found += [
            (f"{prefix}time", time_plot(results, case, title), "Medians of paired runs; bands are their spread. A "
             "cross: the machine has no room for it (time extended as N^2)."),
            (f"{prefix}memory", memory_plot(results, case, title), "Measured in a process for each call."),
            (f"{prefix}floor", floor_plot(results, case, title), "The floor is the work that no form of this loss "
             "without the matrix can avoid, at the rate of torch's fastest matrix products in the same rounds. Forms "
             "that keep the matrix do less work in the backward pass and can pass 1."),
        ]  # fmt: skip
    if results.find(case="clip"):
        found.append(("capacity", capacity_plot(results), "Features, their gradients and the measured peak, extended "
                      "as N^2 where matrices are held and along a line elsewhere."))  # fmt: skip
    few = {case: TITLES.get(case, case) for case in results.names("case") if case != "clip"}
    found.append(("cases", bars(results, few), "Medians and spreads; peak memory beside them."))
    return [Picture(name, figure, caption) for name, figure, caption in found if figure is not None]


def save(results: Results, path: Path) -> list[Path]:
    """Writes path's stem -NAME.png for every picture and returns the files."""
    written = []
    for picture in pictures(results):
        file = path.with_name(f"{path.stem}-{picture.name}.png")
        picture.figure.savefig(file, dpi=DPI, facecolor="white")
        written.append(file)
    return written
